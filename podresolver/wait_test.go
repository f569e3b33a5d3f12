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

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestUnknownAddressWaitsForPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, cart()...)

		begin := time.Now()
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		assert.ErrorContains(t, err, addr.String())
		assert.Equal(t, podresolver.DefaultPodWait, time.Since(begin))
		assert.Len(t, w.api.pods.lookups(), 1)

		go func() {
			time.Sleep(time.Second)
			w.Add(resolvertest.Pod("cart-0", addr.String(), "cart"))
		}()
		took := concurrently(func() {
			pod, err := w.resolver.Resolve(t.Context(), addr)
			if assert.NoError(t, err) {
				assert.Equal(t, "cart-0", pod.Name)
			}
		})
		assert.Equal(t, time.Second, took, "woken by the event, at once")
		assert.Len(t, w.api.pods.lookups(), 1, "no further lookup")

		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err = w.resolver.Resolve(ctx, other)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Len(t, w.api.pods.lookups(), 1, "a canceled request does no lookup")
	})
}

func TestPodWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{PodWait: 42 * time.Millisecond})
		begin := time.Now()
		_, err := w.resolver.Resolve(t.Context(), addr)
		require.ErrorIs(t, err, podresolver.ErrUnknownAddress)
		assert.Equal(t, 42*time.Millisecond, time.Since(begin))
	})
}

func TestCanceledWaitersAreRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		next := addr
		var failed atomic.Int32
		for range 100 {
			at := next
			for range 10 {
				go func() {
					if _, err := w.resolver.Resolve(ctx, at); err != nil {
						failed.Add(1)
					}
				}()
			}
			next = next.Next()
		}
		synctest.Wait()
		requests, addresses := w.resolver.Waiting()
		assert.Equal(t, [2]int{1000, 100}, [2]int{requests, addresses})
		cancel()
		synctest.Wait()
		requests, addresses = w.resolver.Waiting()
		assert.Zero(t, requests+addresses)
		assert.EqualValues(t, 1000, failed.Load())
		assert.Empty(t, w.api.pods.lookups())
	})
}

func TestWaiterIsWokenByItsPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{PodWait: time.Hour})
		begin := time.Now()
		next := addr
		for i := range 20 {
			at, due := next, time.Duration(i+1)*time.Second
			go func() {
				assert.Equal(t, fmt.Sprint("p", i), w.name(at))
				assert.Equal(t, due, time.Since(begin))
			}()
			next = next.Next()
		}
		next = addr
		for i := range 20 {
			time.Sleep(time.Second)
			w.Add(resolvertest.Pod(fmt.Sprint("p", i), next.String(), ""))
			next = next.Next()
		}
		synctest.Wait()
	})
}

func TestZeroAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, podresolver.Config{}, resolvertest.Pod("p", "", ""))
		_, err := w.resolver.Resolve(t.Context(), netip.Addr{})
		assert.ErrorIs(t, err, podresolver.ErrUnknownAddress)
	})
}
