package podresolver_test

import (
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestResolveFollowsPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, append(cart(), resolvertest.Pod("cart-0", addr.String(), "cart"))...)
		require.NoError(t, w.resolver.Ready())

		pod, err := w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		assert.Equal(t, "shop/cart-0", pod.String())
		id, err := w.resolver.Identity(t.Context(), addr, pod, podresolver.Selector{})
		require.NoError(t, err)
		assert.Equal(t, podresolver.Identity{Namespace: "shop", Name: "cart", ClientID: resolvertest.GUID("c1"), ResourceID: strings.ToLower(resolvertest.ResourceID("/r/1")), Binding: "cart"}, id)

		addrs, changed := w.resolver.Addresses()
		assert.Equal(t, []netip.Addr{addr}, addrs)

		// The binding is deleted: the next request is refused.
		w.Delete(resolvertest.Binding("cart", "cart", "cart"))
		<-changed
		synctest.Wait()
		pod, err = w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		_, err = pod.Identity(podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNoIdentity)

		// The pod is deleted, and another gets its address.
		w.Delete(resolvertest.Pod("cart-0", "", ""))
		synctest.Wait()
		_, err = w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		w.Add(resolvertest.Pod("cart-1", addr.String(), "cart"))
		synctest.Wait()
		assert.Equal(t, "cart-1", w.name(addr))
	})
}

// TestResolveFollowsEveryObject changes each kind of object that affects a pod.
func TestResolveFollowsEveryObject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, resolvertest.Pod("p", addr.String(), "cart"))
		now := func(what, want string) {
			t.Helper()
			synctest.Wait()
			pod, err := w.resolver.Resolve(t.Context(), addr)
			require.NoError(t, err, what)
			id, err := pod.Identity(podresolver.Selector{})
			switch {
			case pod.Exception() != "":
				assert.Equal(t, want, "excepted by "+pod.Exception(), what)
			case err != nil:
				assert.Equal(t, want, "refused", what)
			default:
				assert.Equal(t, want, id.Name+" "+id.ClientID, what)
			}
		}
		now("no binding", "refused")
		w.Add(resolvertest.Binding("b", "cart", "i"))
		now("no identity", "refused")
		w.Add(resolvertest.Identity("i", resolvertest.GUID("c1"), ""))
		now("both", "i "+resolvertest.GUID("c1"))
		w.Modify(resolvertest.Identity("i", resolvertest.GUID("c2"), ""))
		now("another client ID", "i "+resolvertest.GUID("c2"))
		w.Add(resolvertest.Identity("j", resolvertest.GUID("c3"), ""))
		w.Add(resolvertest.BindingOfAge("a", "cart", "j", time.Hour))
		now("an older binding", "j "+resolvertest.GUID("c3"))
		w.Modify(resolvertest.BindingOfAge("a", "till", "j", time.Hour))
		now("the older one is for others now", "i "+resolvertest.GUID("c2"))
		w.Modify(resolvertest.Pod("p", addr.String(), "till"))
		now("the pod is one of these others now", "j "+resolvertest.GUID("c3"))
		w.Add(resolvertest.Exception("e", map[string]string{"aadpodidbinding": "till"}))
		now("excepted", "excepted by e")
		w.Modify(resolvertest.Exception("e", map[string]string{"aadpodidbinding": "none"}))
		now("excepted no more", "j "+resolvertest.GUID("c3"))
		w.Modify(resolvertest.Pod("p", addr.String(), ""))
		now("no label", "refused")
		w.Modify(resolvertest.Pod("p", addr.String(), "till"))
		w.Delete(resolvertest.Identity("j", "", ""))
		now("the identity is gone", "refused")
	})
}

func TestTerminatingPodOwnsAddressUntilGraceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, resolvertest.Pod("cart-0", addr.String(), "cart"))
		pod := resolvertest.Pod("cart-0", addr.String(), "cart")
		end := metav1.NewTime(time.Now().Add(30 * time.Second))
		pod.DeletionTimestamp = &end
		pod.Finalizers = []string{"example.com/slow"} // keeps the object
		w.Modify(pod)

		time.Sleep(29 * time.Second)
		assert.Equal(t, "cart-0", w.name(addr))
		time.Sleep(time.Second)
		synctest.Wait()
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
	})
}

func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, podresolver.Config{Mode: podresolver.Standard}, resolvertest.Pod("a", addr.String(), ""), resolvertest.Pod("b", addr.String(), ""))
		assert.Empty(t, w.resolver.Stats().Watches, "nothing is watched yet")
		w.run()
		<-w.resolver.Synced()
		s := w.resolver.Stats()
		assert.Equal(t, 1, s.Addresses, "an ambiguous one counts")
		assert.EqualValues(t, 1, s.Ambiguous)
		var names []string
		for _, watched := range s.Watches {
			names = append(names, watched.Resource)
			assert.Zero(t, watched.StaleFor)
		}
		const group = ".aadpodidentity.k8s.io"
		assert.ElementsMatch(t, []string{
			"pods", "azureidentities" + group, "azureidentitybindings" + group,
			"azurepodidentityexceptions" + group, "azureassignedidentities" + group,
		}, names)

		time.Sleep(7 * time.Second)
		w.Add(resolvertest.Identity("i", resolvertest.GUID("c"), ""))
		synctest.Wait()
		for _, watched := range w.resolver.Stats().Watches {
			want := 7 * time.Second
			if watched.Resource == "azureidentities"+group {
				want = 0
			}
			assert.Equal(t, want, watched.StaleFor, watched.Resource)
		}
	})
}

func TestRunLeaksNoGoroutines(t *testing.T) {
	for name, when := range map[string]func(*world){
		"after sync":  func(w *world) { <-w.resolver.Synced() },
		"before sync": func(*world) {},
		"during an outage": func(w *world) {
			w.api.pods.fail(assert.AnError)
			time.Sleep(time.Minute)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, podresolver.Config{MaxStaleness: time.Minute}, resolvertest.Pod("p", addr.String(), ""))
				synctest.Wait()
				before := bubbled()
				require.Positive(t, before)
				w.run()
				when(w)
				w.stop()
				synctest.Wait()
				assert.LessOrEqual(t, bubbled(), before)
			})
		})
	}
}

// bubbled counts the goroutines of the caller's synctest bubble.
func bubbled() int {
	b := make([]byte, 1<<20)
	stacks := string(b[:runtime.Stack(b, true)])
	own, _, _ := strings.Cut(stacks, ":") // as "goroutine 7 [running, synctest bubble 3]", which is the caller
	_, bubble, _ := strings.Cut(own, ", synctest")
	return strings.Count(stacks, ", synctest"+bubble+":")
}
