package podresolver_test

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// named calls NamedIdentity, and returns how long that took.
func (w *world) named(ctx context.Context, name string) (podresolver.Identity, time.Duration, error) {
	begin := time.Now()
	id, _, err := w.resolver.NamedIdentity(ctx, "shop", name, podresolver.Selector{})
	return id, time.Since(begin), err
}

func TestNamedIdentityWithoutAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), resolvertest.Pod("p", "", "cart"))...)
		id, took, err := w.named(t.Context(), "p")
		require.NoError(t, err)
		assert.Equal(t, "cart", id.Name)
		assert.Zero(t, took)
		_, _, err = w.resolver.NamedIdentity(t.Context(), "shop", "p", podresolver.Selector{ClientID: resolvertest.GUID("another")})
		require.ErrorIs(t, err, podresolver.ErrNoIdentity)
		require.ErrorContains(t, err, "shop/p")
	})
}

func TestNamedIdentityIgnoresExceptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), resolvertest.Pod("p", addr.String(), "cart"),
			resolvertest.Exception("e", map[string]string{"aadpodidbinding": "cart"}))...)
		assert.Equal(t, "e", w.exception(t))
		id, _, err := w.named(t.Context(), "p")
		require.NoError(t, err)
		assert.Equal(t, "cart", id.Name)
	})
}

func (w *world) exception(t *testing.T) string {
	t.Helper()
	pod, err := w.resolver.Resolve(t.Context(), addr)
	require.NoError(t, err)
	return pod.Exception()
}

func TestNamedIdentityWaitsForPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		_, took, err := w.named(t.Context(), "p")
		require.ErrorIs(t, err, podresolver.ErrUnknownPod)
		assert.Equal(t, podresolver.DefaultPodWait, took)
		go func() {
			time.Sleep(time.Second)
			w.Add(resolvertest.Pod("p", "", "cart"))
		}()
		id, took, err := w.named(t.Context(), "p")
		require.NoError(t, err)
		assert.Equal(t, "cart", id.Name)
		assert.Equal(t, time.Second, took)

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, _, err = w.named(ctx, "q")
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

func TestNamedIdentityWaitsForAssignment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := standard(t, cart()...)
		_, took, err := w.named(t.Context(), "p")
		require.ErrorIs(t, err, podresolver.ErrNotAssigned)
		assert.Equal(t, podresolver.DefaultIdentityWait, took)
		go func() {
			time.Sleep(4 * time.Second)
			w.Add(micAssignment("Assigned"))
		}()
		id, took, err := w.named(t.Context(), "p")
		require.NoError(t, err)
		assert.Equal(t, "cart", id.Name)
		assert.Equal(t, 4*time.Second, took)
	})
}

// Requests for a pod by name count towards the limits of its address. That of a pod on the host
// network is the node's.
func TestNamedIdentityAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		onHost := resolvertest.Pod("host", "10.0.0.4", "cart")
		onHost.Spec.HostNetwork = true
		w := start(t, podresolver.Config{}, append(cart(), resolvertest.Pod("p", addr.String(), "cart"), resolvertest.Pod("new", "", "cart"), onHost)...)
		for name, want := range map[string]netip.Addr{"p": addr, "new": {}, "host": {}} {
			_, got, err := w.resolver.NamedIdentity(t.Context(), "shop", name, podresolver.Selector{})
			require.NoError(t, err, name)
			assert.Equal(t, want, got, name)
		}
	})
}
