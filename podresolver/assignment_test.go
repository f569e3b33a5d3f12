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
)

// Waiting for MIC in Standard mode.

func standard(t *testing.T, objects ...runtime.Object) *world {
	t.Helper()
	return start(t, podresolver.Config{Mode: podresolver.Standard}, append(objects, podresolver.NewPod("p", addr.String(), "cart"))...)
}

// micAssignment is MIC's assignment of cart() to the pod of standard.
func micAssignment(state string) runtime.Object {
	return podresolver.NewAssigned("a", "p", state, podresolver.NewIdentity("cart", podresolver.GUID("C1"), podresolver.Path("/r/1")), podresolver.NewBinding("cart", "cart", "cart", 0))
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
		"client ID":               {ClientID: podresolver.GUID("c1")},
		"other case":              {ClientID: podresolver.GUID("C1")},
		"resource ID":             {ResourceID: podresolver.Path("/r/1")},
		"resource ID, other case": {ResourceID: podresolver.Path("/R/1")},
		"both, client ID matches": {ClientID: podresolver.GUID("C1"), ResourceID: podresolver.Path("/r/none")},
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
				w.Add(podresolver.NewAssigned(fmt.Sprint("other", i), fmt.Sprint("q", i), "Assigned", podresolver.NewIdentity("cart", podresolver.GUID("C1"), ""), nil))
			}
			time.Sleep(time.Second)
			w.Add(micAssignment("Assigned"))
		}()
		took := concurrently(func() {
			id, _, err := w.identity(t.Context(), podresolver.Selector{ClientID: podresolver.GUID("C1")})
			if assert.NoError(t, err) {
				assert.Equal(t, podresolver.GUID("c1"), id.ClientID)
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
		"another ID":   {cart(), podresolver.Selector{ClientID: podresolver.GUID("c2")}},
		"an object ID": {cart(), podresolver.Selector{ObjectID: "c1"}},
		"no identity":  {[]runtime.Object{podresolver.NewBinding("cart", "cart", "cart", 0)}, podresolver.Selector{}},
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
		"binding deleted": {func(w *world) { w.Delete(podresolver.NewBinding("cart", "cart", "cart", 0)) }, podresolver.ErrNoIdentity},
		"identity gets another ID": {func(w *world) {
			w.Modify(podresolver.NewIdentity("cart", podresolver.GUID("c2"), ""))
		}, podresolver.ErrNoIdentity},
		"pod deleted": {func(w *world) { w.Delete(podresolver.NewPod("p", "", "")) }, podresolver.ErrUnknownAddress},
		"address reused": {func(w *world) {
			w.Delete(podresolver.NewPod("p", "", ""))
			w.Add(podresolver.NewPod("q", addr.String(), "cart"))
		}, podresolver.ErrUnknownAddress},
		"address reused by a pod of the same name": {func(w *world) {
			pod := podresolver.NewPod("p", addr.String(), "cart")
			pod.UID = "another"
			w.Modify(pod)
		}, podresolver.ErrUnknownAddress},
		"address becomes ambiguous": {func(w *world) { w.Add(podresolver.NewPod("q", addr.String(), "cart")) }, podresolver.ErrUnknownAddress},
		"label removed":             {func(w *world) { w.Modify(podresolver.NewPod("p", addr.String(), "")) }, podresolver.ErrNoIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := standard(t, cart()...)
				go func() {
					time.Sleep(time.Second)
					tc.after(w)
				}()
				_, took, err := w.identity(t.Context(), podresolver.Selector{ClientID: podresolver.GUID("C1")})
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
			append(cart(), podresolver.NewPod("p", addr.String(), "cart"))...)
		_, took, err := w.identity(t.Context(), podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNotAssigned)
		assert.Equal(t, 3*time.Millisecond, took)
	})
}

func TestManagedModeDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, podresolver.NewPod("p", addr.String(), "cart"))
		_, took, err := w.identity(t.Context(), podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNoIdentity)
		assert.Zero(t, took)
	})
}
