package podresolver_test

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestConcurrentRequestsShareLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		w.Pods.AddDropWatch(resolvertest.Pod("cart-0", addr.String(), "cart"))
		w.api.pods.slow(100 * time.Millisecond)
		took := concurrently(func() {
			pod, err := w.resolver.Resolve(t.Context(), addr)
			if assert.NoError(t, err) {
				assert.Equal(t, "cart-0", pod.Name)
				id, err := pod.Identity(podresolver.Selector{})
				assert.NoError(t, err)
				assert.Equal(t, resolvertest.GUID("c1"), id.ClientID)
			}
		})
		assert.Equal(t, podresolver.DefaultPodWait+100*time.Millisecond, took)
		assert.Equal(t, []string{"status.podIP=" + addr.String()}, w.api.pods.lookups())
		s := w.resolver.Stats()
		assert.EqualValues(t, 1, s.Lookups)
		assert.EqualValues(t, 1, s.Found)
	})
}

func TestConcurrentRequestsShareFailedLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		w.api.pods.slow(100 * time.Millisecond)
		var unknown atomic.Int32
		concurrently(func() {
			_, err := w.resolver.Resolve(t.Context(), addr)
			if assert.ErrorIs(t, err, podresolver.ErrUnknownAddress) {
				unknown.Add(1)
			}
		})
		assert.EqualValues(t, 1000, unknown.Load())
		assert.Len(t, w.api.pods.lookups(), 1)
		assert.Zero(t, w.resolver.Stats().Found)
	})
}

func TestLookupRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{PodWait: 100 * time.Millisecond})
		const seconds = 30
		next := addr
		for begin := time.Now(); time.Since(begin) < seconds*time.Second; next = next.Next() {
			_, err := w.resolver.Resolve(t.Context(), next)
			require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		}
		asked := len(w.api.pods.lookups())
		assert.LessOrEqual(t, asked, podresolver.LookupBurst+podresolver.LookupRate*seconds)
		assert.GreaterOrEqual(t, asked, podresolver.LookupRate*seconds, "the rate is used")
		assert.EqualValues(t, asked, w.resolver.Stats().Lookups)

		// All at once, after a while without lookups.
		time.Sleep(time.Hour)
		for range 1000 {
			at := next
			go func() { _, _ = w.resolver.Resolve(t.Context(), at) }()
			next = next.Next()
		}
		time.Sleep(200 * time.Millisecond)
		assert.Len(t, w.api.pods.lookups(), asked+podresolver.LookupBurst)
	})
}

func TestLookupIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		pod := resolvertest.Pod("cart-0", addr.String(), "cart")
		w.Pods.AddDropWatch(pod)
		assert.Equal(t, "cart-0", w.name(addr))
		assert.Zero(t, w.resolver.Stats().Addresses)
		w.Pods.DeleteDropWatch(pod)
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		assert.Len(t, w.api.pods.lookups(), 2)
	})
}

// TestPodsOfLookup: a token of its service account can be bound to a pod that the watch has yet to deliver.
func TestPodsOfLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		account := podresolver.ServiceAccount{Namespace: "shop", Name: resolvertest.ServiceAccountName}
		named := func(i int) podresolver.BoundPod {
			return podresolver.BoundPod{Name: fmt.Sprint("p", i), UID: fmt.Sprint("uid-of-p", i)}
		}
		const more = 5
		next := addr
		for i := range podresolver.MaxLookedUp + more {
			w.Pods.AddDropWatch(resolvertest.Pod(named(i).Name, next.String(), ""))
			assert.Equal(t, named(i).Name, w.name(next))
			assert.Equal(t, named(i), w.resolver.PodsOf(account)[0], "the newest first")
			next = next.Next()
		}
		assert.Len(t, w.resolver.PodsOf(account), podresolver.MaxLookedUp)
		assert.Empty(t, w.resolver.PodsOf(podresolver.ServiceAccount{Namespace: "bank", Name: account.Name}))
		assert.Empty(t, w.resolver.PodsOf(podresolver.ServiceAccount{Namespace: "shop", Name: "other"}))

		w.name(addr) // again
		assert.Equal(t, named(0), w.resolver.PodsOf(account)[0])
		w.Modify(resolvertest.Pod(named(1).Name, "10.0.0.1", ""))
		synctest.Wait()
		assert.Equal(t, []podresolver.BoundPod{named(1), named(0)}, w.resolver.PodsOf(account)[:2], "that of the watch first")
		w.name(addr)
		assert.Len(t, w.resolver.PodsOf(account), podresolver.MaxLookedUp+1)
	})
}

func TestLookupOwner(t *testing.T) {
	pod := func(name string, change func(*corev1.Pod)) *corev1.Pod {
		p := resolvertest.Pod(name, addr.String(), "cart")
		change(p)
		return p
	}
	as := func(name string) *corev1.Pod { return pod(name, func(*corev1.Pod) {}) }
	past := metav1.NewTime(time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC))
	for name, tc := range map[string]struct {
		pods []*corev1.Pod
		err  error
	}{
		"one pod":                      {[]*corev1.Pod{as("p")}, nil},
		"another node":                 {[]*corev1.Pod{pod("p", func(p *corev1.Pod) { p.Spec.NodeName = "node2" })}, podresolver.ErrUnknownAddress},
		"not scheduled":                {[]*corev1.Pod{pod("p", func(p *corev1.Pod) { p.Spec.NodeName = "" })}, podresolver.ErrUnknownAddress},
		"finished":                     {[]*corev1.Pod{pod("p", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })}, podresolver.ErrUnknownAddress},
		"grace period over":            {[]*corev1.Pod{pod("p", func(p *corev1.Pod) { p.DeletionTimestamp = &past })}, podresolver.ErrUnknownAddress},
		"host network":                 {[]*corev1.Pod{pod("p", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}, podresolver.ErrUnknownAddress},
		"another address":              {[]*corev1.Pod{resolvertest.Pod("p", other.String(), "cart")}, podresolver.ErrUnknownAddress},
		"two pods":                     {[]*corev1.Pod{as("p"), as("q")}, podresolver.ErrAmbiguousAddress},
		"the other has failed":         {[]*corev1.Pod{as("p"), pod("q", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })}, nil},
		"the other is on another node": {[]*corev1.Pod{as("p"), pod("q", func(p *corev1.Pod) { p.Spec.NodeName = "node2" })}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, podresolver.Config{}, cart()...)
				for _, p := range tc.pods {
					w.Pods.AddDropWatch(p)
				}
				pod, err := w.resolver.Resolve(t.Context(), addr)
				require.ErrorIs(t, err, tc.err)
				if tc.err == nil {
					assert.Equal(t, "p", pod.Name)
				}
				assert.EqualValues(t, map[bool]int{true: 1}[tc.err == nil], w.resolver.Stats().Found)
			})
		})
	}
}

func TestLookupError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		w.api.pods.fail(assert.AnError)
		begin := time.Now()
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		require.ErrorIs(t, err, assert.AnError)
		assert.ErrorContains(t, err, "the lookup at the API server failed")
		assert.Equal(t, podresolver.DefaultPodWait, time.Since(begin))
	})
}

func TestLookupTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		w.api.pods.slow(time.Hour)
		begin := time.Now()
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		assert.Equal(t, podresolver.DefaultPodWait+podresolver.LookupTimeout, time.Since(begin))

		// A request with less time does not wait for it.
		ctx, cancel := context.WithTimeout(t.Context(), podresolver.DefaultPodWait+time.Millisecond)
		defer cancel()
		_, err = w.resolver.Resolve(ctx, addr)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.NotErrorIs(t, err, podresolver.ErrUnknownAddress)
		time.Sleep(podresolver.LookupTimeout) // it ends without requests that wait
	})
}

func TestLookupOutlivesItsFirstRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		w.api.pods.slow(time.Second)
		w.Pods.AddDropWatch(resolvertest.Pod("p", addr.String(), ""))
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), podresolver.DefaultPodWait+500*time.Millisecond)
			defer cancel()
			_, err := w.resolver.Resolve(ctx, addr)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		}()
		time.Sleep(time.Millisecond)
		assert.Equal(t, "p", w.name(addr))
		assert.Len(t, w.api.pods.lookups(), 1)
	})
}

func TestWatchReplacesLookup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)
		w.Pods.AddDropWatch(resolvertest.Pod("found", addr.String(), "cart"))
		assert.Equal(t, "found", w.name(addr))
		w.Modify(resolvertest.Pod("found", addr.String(), ""))
		synctest.Wait()
		pod, err := w.resolver.Resolve(t.Context(), addr)
		require.NoError(t, err)
		_, err = pod.Identity(podresolver.Selector{})
		require.ErrorIs(t, err, podresolver.ErrNoIdentity)
		assert.Len(t, w.api.pods.lookups(), 1)
	})
}

func TestLookupPerAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		var want []string
		for i, at := range []netip.Addr{addr, other, netip.MustParseAddr("fd00::7")} {
			w.Pods.AddDropWatch(resolvertest.Pod(fmt.Sprint("p", i), at.String(), ""))
			assert.Equal(t, fmt.Sprint("p", i), w.name(at))
			want = append(want, "status.podIP="+at.String())
		}
		assert.Equal(t, want, w.api.pods.lookups())
	})
}
