package podresolver_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// Waiting for MIC in Standard mode.

func standard(t *testing.T, objects ...runtime.Object) *world {
	t.Helper()
	return start(t, podresolver.Config{Mode: podresolver.Standard}, append(objects, resolvertest.Pod("p", addr.String(), "cart"))...)
}

// micAssignment is MIC's assignment of cart() to the pod of standard.
func micAssignment(state string) runtime.Object {
	return resolvertest.Assigned("a", "p", state, resolvertest.Identity("cart", resolvertest.GUID("C1"), resolvertest.ResourceID("/r/1")), resolvertest.Binding("cart", "cart", "cart"))
}

// identity resolves an identity as a request does, and returns how long that took.
func (w *world) identity(ctx context.Context, want podresolver.Selector) (podresolver.Identity, time.Duration, error) {
	w.t.Helper()
	pod, err := w.resolver.Resolve(ctx, addr)
	require.NoError(w.t, err)
	begin := time.Now()
	id, err := w.resolver.Identity(ctx, addr, pod, want)
	return id, time.Since(begin), err
}

func TestAssignedIdentityDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := standard(t, append(cart(), micAssignment("Assigned"))...)
		id, took, err := w.identity(t.Context(), podresolver.Selector{})
		require.NoError(t, err)
		assert.Zero(t, took)
		assert.Equal(t, "cart", id.Name)
	})
}

func TestWaitForAssignment(t *testing.T) {
	for name, want := range map[string]podresolver.Selector{
		"none":                    {},
		"client ID":               {ClientID: resolvertest.GUID("c1")},
		"other case":              {ClientID: resolvertest.GUID("C1")},
		"resource ID":             {ResourceID: resolvertest.ResourceID("/r/1")},
		"resource ID, other case": {ResourceID: resolvertest.ResourceID("/R/1")},
		"both, client ID matches": {ClientID: resolvertest.GUID("C1"), ResourceID: resolvertest.ResourceID("/r/none")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := standard(t, cart()...)
				_, took, err := w.identity(t.Context(), want)
				require.ErrorIs(t, err, podresolver.ErrNotAssigned)
				assert.ErrorContains(t, err, "shop/cart")
				assert.Equal(t, podresolver.DefaultIdentityWait, took)

				go func() {
					time.Sleep(time.Second)
					w.Add(micAssignment("Created"))
					time.Sleep(time.Second)
					w.Modify(micAssignment("Assigned"))
				}()
				id, took, err := w.identity(t.Context(), want)
				require.NoError(t, err)
				assert.Equal(t, "cart", id.Name)
				assert.Equal(t, 2*time.Second, took, "woken at once, by the state Assigned")
			})
		})
	}
}

func TestConcurrentWaitsForOneAssignment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := standard(t, cart()...)
		go func() {
			time.Sleep(time.Second)
			for i := range 100 { // of other pods
				w.Add(resolvertest.Assigned(fmt.Sprint("other", i), fmt.Sprint("q", i), "Assigned", resolvertest.Identity("cart", resolvertest.GUID("C1"), ""), nil))
			}
			time.Sleep(time.Second)
			w.Add(micAssignment("Assigned"))
		}()
		took := concurrently(func() {
			id, _, err := w.identity(t.Context(), podresolver.Selector{ClientID: resolvertest.GUID("C1")})
			if assert.NoError(t, err) {
				assert.Equal(t, resolvertest.GUID("c1"), id.ClientID)
			}
		})
		assert.Equal(t, 2*time.Second, took)
		requests, addresses := w.resolver.Waiting()
		assert.Zero(t, requests+addresses)
	})
}

func TestUnboundIdentityDoesNotWait(t *testing.T) {
	for name, tc := range map[string]struct {
		objects []runtime.Object
		want    podresolver.Selector
	}{
		"no binding":   {nil, podresolver.Selector{}},
		"another ID":   {cart(), podresolver.Selector{ClientID: resolvertest.GUID("c2")}},
		"an object ID": {cart(), podresolver.Selector{ObjectID: "c1"}},
		"no identity":  {[]runtime.Object{resolvertest.Binding("cart", "cart", "cart")}, podresolver.Selector{}},
		"Unassigned":   {[]runtime.Object{micAssignment("Unassigned")}, podresolver.Selector{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := standard(t, tc.objects...)
				_, took, err := w.identity(t.Context(), tc.want)
				require.ErrorIs(t, err, podresolver.ErrNoIdentity)
				assert.Zero(t, took)
			})
		})
	}
}

func TestWaitForAssignmentEndsEarly(t *testing.T) {
	for name, tc := range map[string]struct {
		after func(w *world)
		want  error
	}{
		"binding deleted": {func(w *world) { w.Delete(resolvertest.Binding("cart", "cart", "cart")) }, podresolver.ErrNoIdentity},
		"identity gets another ID": {func(w *world) {
			w.Modify(resolvertest.Identity("cart", resolvertest.GUID("c2"), ""))
		}, podresolver.ErrNoIdentity},
		"pod deleted": {func(w *world) { w.Delete(resolvertest.Pod("p", "", "")) }, podresolver.ErrUnknownAddress},
		"address reused": {func(w *world) {
			w.Delete(resolvertest.Pod("p", "", ""))
			w.Add(resolvertest.Pod("q", addr.String(), "cart"))
		}, podresolver.ErrUnknownAddress},
		"address reused by a pod of the same name": {func(w *world) {
			pod := resolvertest.Pod("p", addr.String(), "cart")
			pod.UID = "another"
			w.Modify(pod)
		}, podresolver.ErrUnknownAddress},
		"address becomes ambiguous": {func(w *world) { w.Add(resolvertest.Pod("q", addr.String(), "cart")) }, podresolver.ErrUnknownAddress},
		"label removed":             {func(w *world) { w.Modify(resolvertest.Pod("p", addr.String(), "")) }, podresolver.ErrNoIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := standard(t, cart()...)
				go func() {
					time.Sleep(time.Second)
					tc.after(w)
				}()
				_, took, err := w.identity(t.Context(), podresolver.Selector{ClientID: resolvertest.GUID("C1")})
				require.ErrorIs(t, err, tc.want)
				assert.Equal(t, time.Second, took)
			})
		})
	}
}

func TestWaitForAssignmentCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := standard(t, cart()...)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, took, err := w.identity(ctx, podresolver.Selector{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, podresolver.ErrNotAssigned)
		assert.Equal(t, time.Second, took)
	})
}

func TestIdentityWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{Mode: podresolver.Standard, IdentityWait: 3 * time.Millisecond},
			append(cart(), resolvertest.Pod("p", addr.String(), "cart"))...)
		_, took, err := w.identity(t.Context(), podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNotAssigned)
		assert.Equal(t, 3*time.Millisecond, took)
	})
}

func TestManagedModeDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, resolvertest.Pod("p", addr.String(), "cart"))
		_, took, err := w.identity(t.Context(), podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNoIdentity)
		assert.Zero(t, took)
	})
}
