package podresolver_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

var (
	notFound  = apierrors.NewNotFound(schema.GroupResource{}, "")
	forbidden = apierrors.NewForbidden(schema.GroupResource{Resource: "things"}, "", nil)
)

const custom = ".aadpodidentity.k8s.io"

// sources are the sources of a world in Standard mode by resource.
func (w *world) sources() map[string]*faultySource {
	return map[string]*faultySource{
		"pods": w.api.pods, "azureidentities" + custom: w.api.identities, "azureidentitybindings" + custom: w.api.bindings,
		"azurepodidentityexceptions" + custom: w.api.exceptions, "azureassignedidentities" + custom: w.api.assigned,
	}
}

func TestNoDecisionBeforeSync(t *testing.T) {
	for _, name := range []string{"pods", "azureidentities" + custom, "azureidentitybindings" + custom, "azurepodidentityexceptions" + custom, "azureassignedidentities" + custom} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, podresolver.Config{Mode: podresolver.Standard},
					append(cart(), resolvertest.Pod("p", addr.String(), "cart"), micAssignment("Assigned"))...)
				w.sources()[name].fail(forbidden)
				w.run()
				synctest.Wait()
				_, err := w.resolver.Resolve(t.Context(), addr)
				require.ErrorIs(t, err, podresolver.ErrNotSynced)
				require.NotErrorIs(t, err, podresolver.ErrUnknownAddress, "it is not known to be unknown")
				require.ErrorContains(t, err, "the agent has not synced with the API server yet: "+name+": the agent's service account may not list and watch this resource", "with the reason")
				_, _, err = w.resolver.NamedIdentity(t.Context(), "shop", "p", podresolver.Selector{})
				require.ErrorIs(t, err, podresolver.ErrNotSynced)
				require.ErrorContains(t, err, name+": ")
				_, err = w.resolver.Explain("shop", "p", podresolver.Selector{}, nil)
				require.ErrorIs(t, err, podresolver.ErrNotSynced)
				assert.Empty(t, w.api.pods.lookups(), "no lookups before sync")
				addrs, _ := w.resolver.Addresses()
				assert.Empty(t, addrs)

				err = w.resolver.Ready()
				require.ErrorContains(t, err, name+": the agent's service account may not list and watch this resource")
				assert.Len(t, strings.Split(err.Error(), "\n"), 1, "other resources are not named")
				require.ErrorContains(t, w.resolver.Stale(), name)

				w.sources()[name].fail(nil)
				time.Sleep(2 * podresolver.LastRetry)
				require.NoError(t, w.resolver.Ready())
				require.NoError(t, w.resolver.Stale())
				assert.Equal(t, "p", w.name(addr))
			})
		})
	}
}

func TestRequestWaitsForFirstSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{}, resolvertest.Pod("p", addr.String(), "cart"))
		w.api.bindings.slow(time.Second)
		require.ErrorContains(t, w.resolver.Ready(), "pods: waiting for the first list")
		w.run()
		begin := time.Now()
		assert.Equal(t, "p", w.name(addr))
		assert.Equal(t, time.Second, time.Since(begin))
	})
}

func TestMissingCRD(t *testing.T) {
	for _, name := range []string{"azureidentities" + custom, "azureidentitybindings" + custom, "azureassignedidentities" + custom} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, podresolver.Config{Mode: podresolver.Standard}, resolvertest.Pod("p", addr.String(), "cart"))
			w.sources()[name].fail(notFound)
			w.run()
			time.Sleep(time.Hour)
			require.ErrorContains(t, w.resolver.Ready(), name+": the API server does not have this resource: apply the custom resource definitions")
		})
	}
}

func TestMissingExceptionCRD(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{}, append(cart(), resolvertest.Pod("p", addr.String(), "cart"))...)
		w.api.exceptions.fail(notFound)
		w.run()
		synctest.Wait()
		require.NoError(t, w.resolver.Ready())
		require.ErrorContains(t, w.resolver.Stale(), "azurepodidentityexceptions"+custom+": the API server does not have this resource")
		assert.Equal(t, "p", w.name(addr))

		// The CRD is created, and an exception.
		w.api.exceptions.fail(nil)
		w.Add(resolvertest.Exception("e", map[string]string{"aadpodidbinding": "cart"}))
		time.Sleep(2 * podresolver.LastRetry)
		require.NoError(t, w.resolver.Stale())
		pod, err := w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		assert.Equal(t, "e", pod.Exception())

		// The CRD is deleted. Excepted pods stay excepted.
		w.api.exceptions.fail(notFound)
		time.Sleep(time.Hour)
		require.ErrorContains(t, w.resolver.Stale(), "azurepodidentityexceptions")
		pod, err = w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		assert.Equal(t, "e", pod.Exception())
	})
}

func TestWatchErrorIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		w := newWorld(t, podresolver.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		w.api.bindings.fail(forbidden)
		w.run()
		time.Sleep(time.Hour)
		synctest.Wait()
		assert.Equal(t, 1, strings.Count(log.String(), "cannot watch the API server"), log.String())
		w.api.bindings.fail(nil)
		time.Sleep(2 * podresolver.LastRetry)
		synctest.Wait()
		assert.Equal(t, 1, strings.Count(log.String(), "watching the API server again"), log.String())
	})
}

func TestRetryBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{})
		w.api.pods.fail(context.DeadlineExceeded)
		w.run()
		time.Sleep(time.Hour)
		w.api.pods.mu.Lock()
		defer w.api.pods.mu.Unlock()
		assert.LessOrEqual(t, len(w.api.pods.lists), int(time.Hour/podresolver.LastRetry)+10)
		assert.GreaterOrEqual(t, len(w.api.pods.lists), int(time.Hour/podresolver.LastRetry)/2)
	})
}
