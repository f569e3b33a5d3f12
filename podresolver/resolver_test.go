package podresolver

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// cluster is a pair of fake clients and a resolver that reads from them.
type cluster struct {
	t        *testing.T
	kube     *fake.Clientset
	custom   *dynamicfake.FakeDynamicClient
	resolver *Resolver
	stop     func()
}

func newCluster(t *testing.T, custom ...runtime.Object) *cluster {
	t.Helper()
	c := &cluster{
		t:    t,
		kube: fake.NewClientset(),
		custom: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
			aadpodidentity.AzureIdentities:            "AzureIdentityList",
			aadpodidentity.AzureIdentityBindings:      "AzureIdentityBindingList",
			aadpodidentity.AzurePodIdentityExceptions: "AzurePodIdentityExceptionList",
		}, custom...),
	}
	var err error
	c.resolver, err = New(c.kube, c.custom, Config{Node: "node1", Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return c
}

func (c *cluster) run() {
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.resolver.Run(ctx)
	}()
	c.stop = func() {
		cancel()
		<-done
	}
}

func object(kind, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": aadpodidentity.GroupVersion.String(),
		"kind":       kind,
		"metadata":   map[string]any{"namespace": "shop", "name": name},
		"spec":       spec,
	}}
}

func cartWorld() []runtime.Object {
	return []runtime.Object{
		object("AzureIdentity", "cart", map[string]any{"type": int64(0), "clientID": "C1", "resourceID": "/r/1"}),
		object("AzureIdentityBinding", "cart", map[string]any{"azureIdentity": "cart", "selector": "cart"}),
	}
}

func (c *cluster) createPod(name, ip string) {
	c.t.Helper()
	_, err := c.kube.CoreV1().Pods("shop").Create(c.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{aadpodidentity.BindingLabel: "cart"}},
		Spec:       corev1.PodSpec{NodeName: "node1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}, metav1.CreateOptions{})
	require.NoError(c.t, err)
}

var addr = netip.MustParseAddr("10.244.0.7")

func TestAPodIsResolvedAndFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, cartWorld()...)
		c.createPod("cart-0", addr.String())
		c.run()
		defer c.stop()
		<-c.resolver.Synced()
		require.NoError(t, c.resolver.Ready())

		pod, err := c.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		assert.Equal(t, "shop/cart-0", pod.String())
		id, err := pod.Identity(Selector{})
		require.NoError(t, err)
		assert.Equal(t, Identity{Namespace: "shop", Name: "cart", ClientID: "c1", ResourceID: "/r/1", Binding: "cart"}, id)

		addrs, changed := c.resolver.Addresses()
		assert.Equal(t, []netip.Addr{addr}, addrs)

		// The binding goes: the very next request is refused.
		require.NoError(t, c.custom.Resource(aadpodidentity.AzureIdentityBindings).Namespace("shop").Delete(t.Context(), "cart", metav1.DeleteOptions{}))
		<-changed
		synctest.Wait()
		pod, err = c.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		_, err = pod.Identity(Selector{})
		require.ErrorIs(t, err, ErrNoIdentity)

		// The pod goes, and another takes its address: never the old one.
		require.NoError(t, c.kube.CoreV1().Pods("shop").Delete(t.Context(), "cart-0", metav1.DeleteOptions{}))
		synctest.Wait()
		_, err = c.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, ErrUnknownAddress)
		c.createPod("cart-1", addr.String())
		synctest.Wait()
		pod, err = c.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		assert.Equal(t, "shop/cart-1", pod.String())
	})
}

func TestATerminatingPodOwnsItsAddressUntilItsGraceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, cartWorld()...)
		c.createPod("cart-0", addr.String())
		c.run()
		defer c.stop()
		<-c.resolver.Synced()
		pods := c.kube.CoreV1().Pods("shop")
		pod, err := pods.Get(t.Context(), "cart-0", metav1.GetOptions{})
		require.NoError(t, err)
		end := metav1.NewTime(time.Now().Add(30 * time.Second))
		pod.DeletionTimestamp = &end
		pod.Finalizers = []string{"example.com/slow"} // keeps the object long after
		_, err = pods.Update(t.Context(), pod, metav1.UpdateOptions{})
		require.NoError(t, err)

		time.Sleep(29 * time.Second)
		_, err = c.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		_, err = c.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, ErrUnknownAddress)
	})
}

func TestPodsOfOtherNodesAreNotKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		_, err := c.kube.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "elsewhere"},
			Spec:       corev1.PodSpec{NodeName: "node2"},
			Status:     corev1.PodStatus{PodIP: addr.String()},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
		c.run()
		defer c.stop()
		<-c.resolver.Synced()
		_, err = c.resolver.Resolve(t.Context(), addr)
		assert.ErrorIs(t, err, ErrUnknownAddress)

		// The fake does not filter; the API server does, when asked to.
		asked := 0
		for _, action := range c.kube.Actions() {
			if watch, ok := action.(clienttesting.WatchAction); ok {
				assert.Equal(t, "spec.nodeName=node1", watch.GetWatchRestrictions().Fields.String())
				asked++
			}
		}
		assert.NotZero(t, asked)
	})
}

func TestUnknownAddressesWaitForTheEventAndNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, cartWorld()...)
		c.run()
		defer c.stop()
		<-c.resolver.Synced()

		begin := time.Now()
		_, err := c.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, ErrUnknownAddress)
		assert.Equal(t, DefaultPodWait, time.Since(begin))

		begin = time.Now()
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				pod, err := c.resolver.Resolve(t.Context(), addr)
				if assert.NoError(t, err) {
					assert.Equal(t, "cart-0", pod.Name)
				}
			})
		}
		time.Sleep(time.Second)
		c.createPod("cart-0", addr.String())
		wg.Wait()
		assert.Equal(t, time.Second, time.Since(begin), "woken by the event, at once")

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err = c.resolver.Resolve(ctx, netip.MustParseAddr("10.244.0.8"))
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

func TestNothingIsDecidedBeforeAllHasSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, cartWorld()...)
		var mu sync.Mutex
		missing := true
		c.custom.PrependReactor("list", "azurepodidentityexceptions", func(clienttesting.Action) (bool, runtime.Object, error) {
			mu.Lock()
			defer mu.Unlock()
			if missing {
				return true, nil, apierrors.NewNotFound(schema.GroupResource{}, "")
			}
			return false, nil, nil
		})
		c.createPod("cart-0", addr.String())
		c.run()
		defer c.stop()
		_, err := c.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, ErrUnknownAddress, "the exceptions are not known: no decision")
		require.Error(t, c.resolver.Stale())
		require.ErrorContains(t, c.resolver.Ready(), "azurepodidentityexceptions.aadpodidentity.k8s.io: the API server does not know this resource: apply the custom resource definitions")

		mu.Lock()
		missing = false
		mu.Unlock()
		time.Sleep(time.Minute) // the informer's own back-off
		require.NoError(t, c.resolver.Ready())
		require.NoError(t, c.resolver.Stale())
		_, err = c.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
	})
}

func TestAnObjectThatDoesNotFitGrantsNothing(t *testing.T) {
	odd := object("AzureIdentity", "odd", map[string]any{"type": map[string]any{}, "clientID": "c1"})
	assert.Zero(t, trimIdentity(odd).(*aadpodidentity.AzureIdentity).Spec)
	noSpec := object("AzureIdentity", "odd", nil)
	assert.Zero(t, trimIdentity(noSpec).(*aadpodidentity.AzureIdentity).Spec)
}

func TestResolveAndDecideAllocateNothing(t *testing.T) {
	r := filled(t, 250)
	ctx := t.Context()
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		pod, err := r.Resolve(ctx, addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = pod.Identity(Selector{ClientID: "C-1"}); err != nil {
			t.Fatal(err)
		}
	}))
}

// filled is a resolver that knows n pods, without informers.
func filled(tb testing.TB, n int) *Resolver {
	tb.Helper()
	r, err := New(fake.NewClientset(), dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()), Config{Node: "node1"})
	require.NoError(tb, err)
	world := objects(identity("i", "c-1", ""), binding("b", "x", "i", 0))
	var claims []claim
	next := addr
	for i := range n {
		pod := podWith(map[string]string{aadpodidentity.BindingLabel: "x"})
		pod.Name = fmt.Sprintf("pod-%d", i)
		pod.Status.PodIP = next.String()
		claims = append(claims, claimsOf(pod, decide(pod, world))...)
		next = next.Next()
	}
	s, _ := newSnapshot(claims, time.Now())
	r.current.Store(s)
	return r
}

func BenchmarkResolve(b *testing.B) {
	r := filled(b, 250)
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		pod, err := r.Resolve(ctx, addr)
		if err != nil {
			b.Fatal(err)
		}
		if _, err = pod.Identity(Selector{}); err != nil {
			b.Fatal(err)
		}
	}
}
