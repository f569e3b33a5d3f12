package podresolver_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
)

func TestKnownPodsOutliveTheAPIServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, podresolver.NewPod("p", addr.String(), "cart"))
		for _, g := range []*gate{w.gates.pods, w.gates.bindings, w.gates.identities} {
			g.fail(assert.AnError)
		}
		time.Sleep(24 * time.Hour)
		require.ErrorIs(t, w.resolver.Stale(), assert.AnError)
		require.NoError(t, w.resolver.Ready(), "without MaxStaleness")
		assert.Equal(t, "p", w.name(addr))
	})
}

func TestWhatWasMissedIsMadeUpFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), podresolver.NewPod("p", addr.String(), "cart"))...)
		w.gates.pods.fail(assert.AnError)
		w.Delete(podresolver.NewPod("p", "", ""))
		w.Add(podresolver.NewPod("q", addr.String(), "cart"))
		w.Add(podresolver.NewPod("r", other.String(), "cart"))
		w.Pods.ResetWatch() // so that a list is needed
		time.Sleep(time.Minute)
		assert.Equal(t, "p", w.name(addr), "as far as anybody knows")
		w.gates.pods.fail(nil)
		time.Sleep(2 * podresolver.LastRetry)
		assert.Equal(t, "q", w.name(addr))
		assert.Equal(t, "r", w.name(other))
		require.NoError(t, w.resolver.Stale())
	})
}

func TestDecisionsThatAreTooOldAreNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{MaxStaleness: time.Minute}, podresolver.NewPod("p", addr.String(), "cart"))
		time.Sleep(24 * time.Hour)
		assert.Equal(t, "p", w.name(addr), "a quiet watch is none that fails")

		time.Sleep(time.Millisecond) // out of step with the ticker
		w.Add(podresolver.NewIdentity("i", "c", ""))
		synctest.Wait()
		w.gates.identities.fail(assert.AnError)
		time.Sleep(time.Minute - 2*time.Millisecond)
		assert.Equal(t, "p", w.name(addr))
		time.Sleep(time.Second + 2*time.Millisecond)
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrStale)
		_, err = w.resolver.Resolve(t.Context(), other)
		require.ErrorIs(t, err, podresolver.ErrStale, "at once, and without a lookup")
		assert.Empty(t, w.gates.pods.lookups())
		require.ErrorIs(t, w.resolver.Ready(), podresolver.ErrStale)
		require.ErrorIs(t, w.resolver.Ready(), assert.AnError)

		w.gates.identities.fail(nil)
		time.Sleep(2 * podresolver.LastRetry)
		require.NoError(t, w.resolver.Ready())
		assert.Equal(t, "p", w.name(addr))
	})
}

// TestAMissingDefinitionIsNotSilence: the API server is there, and says that there
// are no exceptions.
func TestAMissingDefinitionIsNotSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{MaxStaleness: time.Minute}, podresolver.NewPod("p", addr.String(), "cart"))
		w.gates.exceptions.fail(notFound)
		w.run()
		<-w.resolver.Synced()
		time.Sleep(time.Hour)
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
	})
}

// TestWhoWaitsLearnsThatAllIsTooOld: a wait may outlast MaxStaleness.
func TestWhoWaitsLearnsThatAllIsTooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{MaxStaleness: time.Second, PodWait: time.Minute})
		w.gates.bindings.fail(assert.AnError)
		w.Pods.AddDropWatch(podresolver.NewPod("p", addr.String(), "cart"))
		_, err := w.resolver.Resolve(t.Context(), addr)
		assert.ErrorIs(t, err, podresolver.ErrStale, "what a lookup finds is decided by what is too old")
	})
}
