package upstream

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		u, stop := inMemory(t, imds)
		defer stop()
		require.Equal(t, Stats{Available: true}, u.Stats())
		for _, fault := range []imdstest.Fault{{Delay: time.Second}, {Status: 400, Body: `{"error":"x"}`}, {Status: 500}, {Status: 429}} {
			imds.Inject(fault)
			_, _ = u.Token(t.Context(), asking(key)) // after 500 it is asked again
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(3*time.Second, func() {
			assert.Equal(t, 1, u.Stats().IMDS.InFlight)
			cancel()
		})
		imds.Inject(imdstest.Fault{Hang: true})
		_, err := u.Token(ctx, asking(key))
		require.ErrorIs(t, err, context.Canceled)

		s := u.Stats().IMDS
		for outcome, count := range map[Outcome]uint64{OK: 2, Refused: 1, Throttled: 1, Unavailable: 1} {
			assert.Equal(t, count, s.Durations[outcome].Count(), outcome.String())
		}
		assert.Equal(t, time.Second, s.Durations[OK].Sum)
		assert.Equal(t, uint64(6), s.Waits.Count(), "each has waited for its slot")
		assert.Equal(t, time.Second, s.Waits.Sum, "after the 429")
		assert.Zero(t, s.InFlight+s.Waiting)
		assert.Zero(t, u.Stats().Entra.Waits.Count())
	})
}
