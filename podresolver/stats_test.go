package podresolver_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestResolutionsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		known, shared, late, never := addr, netip.MustParseAddr("10.244.0.8"), netip.MustParseAddr("10.244.0.9"), netip.MustParseAddr("10.244.0.10")
		w.Add(resolvertest.Pod("known", known.String(), "cart"))
		w.Add(resolvertest.Pod("one", shared.String(), "cart"))
		w.Add(resolvertest.Pod("another", shared.String(), "cart"))
		synctest.Wait()
		resolve := func(ctx context.Context, addr netip.Addr, confirmed error) {
			_, _ = w.resolver.ResolveCaller(ctx, addr, func(*podresolver.Pod) error { return confirmed })
		}
		_, err := w.resolver.ResolveNow(known, func(*podresolver.Pod) error { return nil })
		require.NoError(t, err)
		assert.Zero(t, w.resolver.Stats().Resolutions, "its caller counts that")

		resolve(t.Context(), known, nil)
		resolve(t.Context(), known, errors.New("forged"))
		resolve(t.Context(), known, podresolver.ErrUnconfirmed)
		resolve(t.Context(), shared, nil)
		resolve(t.Context(), never, nil)
		assert.Equal(t, 2*podresolver.DefaultPodWait, w.resolver.Stats().WaitTime)
		time.AfterFunc(time.Second, func() { w.Add(resolvertest.Pod("late", late.String(), "cart")) })
		resolve(t.Context(), late, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		resolve(ctx, never, nil)
		resolve(ctx, never, nil) // it has ended already

		s := w.resolver.Stats()
		got := make(map[string]uint64)
		for outcome, n := range s.Resolutions {
			got[podresolver.Outcome(outcome).String()] = n
		}
		assert.Equal(t, map[string]uint64{
			"found": 1, "waited": 1, "unknown": 1, "ambiguous": 1, "unconfirmed": 1, "untrusted": 1, "abandoned": 1, "stale": 0, "not_synced": 0,
		}, got)
		assert.Equal(t, 2*podresolver.DefaultPodWait+2*time.Second, s.WaitTime)
	})
}
