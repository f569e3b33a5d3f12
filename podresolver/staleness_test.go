package podresolver_test

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestKnownPodsDuringAPIServerOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, resolvertest.Pod("p", addr.String(), "cart"))
		for _, g := range []*faultySource{w.api.pods, w.api.bindings, w.api.identities} {
			g.fail(assert.AnError)
		}
		time.Sleep(24 * time.Hour)
		require.ErrorIs(t, w.resolver.Stale(), assert.AnError)
		require.NoError(t, w.resolver.Ready(), "without MaxStaleness")
		assert.Equal(t, "p", w.name(addr))
	})
}

func TestRelistAfterMissedEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), resolvertest.Pod("p", addr.String(), "cart"))...)
		w.api.pods.fail(assert.AnError)
		w.Delete(resolvertest.Pod("p", "", ""))
		w.Add(resolvertest.Pod("q", addr.String(), "cart"))
		w.Add(resolvertest.Pod("r", other.String(), "cart"))
		w.Pods.ResetWatch() // a list is needed
		time.Sleep(time.Minute)
		assert.Equal(t, "p", w.name(addr), "as far as the resolver knows")
		w.api.pods.fail(nil)
		time.Sleep(2 * podresolver.LastRetry)
		assert.Equal(t, "q", w.name(addr))
		assert.Equal(t, "r", w.name(other))
		require.NoError(t, w.resolver.Stale())
	})
}

// maxStaleness is more than the time between two bookmarks.
const maxStaleness = 3 * time.Minute

// bookmarks sends bookmarks as an idle API server does, until the test ends.
func (w *world) bookmarks(g *faultySource) {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	w.t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			select {
			case <-time.After(time.Minute):
				g.bookmark()
			case <-ctx.Done():
			}
		}
	}()
}

func TestMaxStaleness(t *testing.T) {
	gone := apierrors.NewGenericServerResponse(http.StatusGone, "list", schema.GroupResource{}, "", "", 0, false)
	invalid := apierrors.NewInvalid(schema.GroupKind{}, "", nil)
	for name, tc := range map[string]struct {
		breaks func(*faultySource)
		says   string // part of the error of Ready
	}{
		"unreachable": {func(g *faultySource) { g.fail(assert.AnError) }, assert.AnError.Error()},
		"silent":      {func(g *faultySource) { g.mute(true) }, "the API server has sent nothing for 3m"},
		"504":         {func(g *faultySource) { g.fail(apierrors.NewTimeoutError("too large resource version", 1)) }, "too large resource version"},
		"410":         {func(g *faultySource) { g.fail(gone) }, "the API server returned an error: "},
		"422":         {func(g *faultySource) { g.fail(invalid) }, "the API server returned an error: "},
		"403":         {func(g *faultySource) { g.fail(forbidden) }, "the agent's service account may not list and watch"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := &testlog.Buffer{}
				w := start(t, podresolver.Config{MaxStaleness: maxStaleness, Logger: slog.New(slog.NewTextHandler(log, nil))}, resolvertest.Pod("p", addr.String(), "cart"))
				for _, g := range w.sources() {
					w.bookmarks(g)
				}
				time.Sleep(24 * time.Hour)
				assert.Equal(t, "p", w.name(addr), "bookmarks keep it fresh")
				require.NoError(t, w.resolver.Stale())

				w.Add(resolvertest.Identity("i", resolvertest.GUID("c"), ""))
				synctest.Wait()
				tc.breaks(w.api.identities)
				time.Sleep(maxStaleness - time.Second)
				assert.Equal(t, "p", w.name(addr))
				decision, err := w.resolver.Explain("shop", "p", podresolver.Selector{}, nil)
				require.NoError(t, err)
				assert.Equal(t, w.resolver.Stale() != nil, hasStep(decision, "data"), "it is served, with a warning")
				time.Sleep(3 * time.Second)
				_, err = w.resolver.Resolve(t.Context(), addr)
				require.ErrorIs(t, err, podresolver.ErrStale)
				_, err = w.resolver.Resolve(t.Context(), other)
				require.ErrorIs(t, err, podresolver.ErrStale, "at once, and without a lookup")
				assert.Empty(t, w.api.pods.lookups())
				require.ErrorIs(t, w.resolver.Ready(), podresolver.ErrStale)
				require.ErrorContains(t, w.resolver.Ready(), "azureidentities"+custom+": ")
				require.ErrorContains(t, w.resolver.Ready(), tc.says)
				synctest.Wait()
				assert.Equal(t, 1, strings.Count(log.String(), "pod and identity data is stale; refusing"), log.String())
				decision, err = w.resolver.Explain("shop", "p", podresolver.Selector{}, nil)
				require.NoError(t, err)
				require.ErrorIs(t, decision.Refusal, podresolver.ErrStale)
				assert.Equal(t, podresolver.PodDataStale, decision.Reason)
				assert.NotEmpty(t, decision.Fix)

				w.api.identities.fail(nil)
				time.Sleep(2 * time.Minute)
				require.NoError(t, w.resolver.Ready())
				require.NoError(t, w.resolver.Stale())
				decision, err = w.resolver.Explain("shop", "p", podresolver.Selector{}, nil)
				require.NoError(t, err)
				assert.False(t, hasStep(decision, "data"))
				assert.Equal(t, "p", w.name(addr))
				synctest.Wait()
				assert.Contains(t, log.String(), "pod and identity data is up to date")
			})
		})
	}
}

func hasStep(d *podresolver.Decision, name string) bool {
	return slices.ContainsFunc(d.Steps, func(s podresolver.Step) bool { return s.Name == name })
}

// TestSilentWatchIsRelisted: etcd may send no progress notifications, or a proxy may hold up
// watches. Lists are as good.
func TestSilentWatchIsRelisted(t *testing.T) {
	for maxStaleness, patience := range map[time.Duration]time.Duration{0: 12 * time.Minute, maxStaleness: 2 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, podresolver.Config{MaxStaleness: maxStaleness}, resolvertest.Pod("p", addr.String(), "cart"))
			for _, g := range w.sources() {
				g.mute(false)
			}
			w.api.pods.mu.Lock()
			lists := len(w.api.pods.lists)
			w.api.pods.mu.Unlock()
			w.Add(resolvertest.Pod("q", other.String(), "cart"))
			time.Sleep(patience - time.Second)
			assert.Nil(t, w.resolver.Owner(other))
			time.Sleep(time.Minute)
			known := w.resolver.Owner(other) // no lookup
			require.NotNil(t, known)
			assert.Equal(t, "q", known.Name)
			for range 600 {
				time.Sleep(time.Minute)
				require.NoError(t, w.resolver.Ready())
				require.NoError(t, w.resolver.Stale())
			}
			w.api.pods.mu.Lock()
			defer w.api.pods.mu.Unlock()
			assert.LessOrEqual(t, len(w.api.pods.lists)-lists, int(601*time.Minute/patience)+1, "no more often than needed")
		})
	}
}

// TestListTimeout: the connection may be broken.
func TestListTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{}, resolvertest.Pod("p", addr.String(), "cart"))
		w.api.bindings.mute(true)
		w.run()
		time.Sleep(10 * time.Minute)
		require.ErrorContains(t, w.resolver.Ready(), "azureidentitybindings"+custom+": ")
		w.api.bindings.mu.Lock()
		assert.Greater(t, len(w.api.bindings.lists), 2)
		w.api.bindings.mu.Unlock()
	})
}

// TestMissingExceptionCRDIsNotStale: the API server responds that there are no exceptions.
func TestMissingExceptionCRDIsNotStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{MaxStaleness: maxStaleness}, resolvertest.Pod("p", addr.String(), "cart"))
		w.api.exceptions.fail(notFound)
		w.run()
		<-w.resolver.Synced()
		for name, g := range w.sources() {
			if !strings.HasPrefix(name, "azurepodidentityexceptions") {
				w.bookmarks(g)
			}
		}
		time.Sleep(time.Hour)
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
	})
}

// TestStaleWhileWaiting: PodWait may be longer than MaxStaleness.
func TestStaleWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{MaxStaleness: time.Second, PodWait: time.Minute})
		w.api.bindings.fail(assert.AnError)
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrStale, "a lookup would be decided by stale objects")
		assert.Empty(t, w.api.pods.lookups())
	})
}
