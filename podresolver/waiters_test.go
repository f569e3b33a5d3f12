package podresolver

import (
	"context"
	"maps"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// snapshotOf is a snapshot of these owners.
func snapshotOf(pods map[netip.Addr]*Pod) *snapshot {
	for addr, pod := range pods {
		pod.info = &podInfo{addrs: []netip.Addr{addr}}
	}
	s, _ := newSnapshot(maps.Values(pods), time.Now())
	return s
}

func TestWaiterIsWokenByItsAddressOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			w       waiters
			current atomic.Pointer[snapshot]
			woken   atomic.Int32
		)
		publish := func(s *snapshot) {
			before := current.Swap(s)
			w.wake(before, s)
			synctest.Wait()
		}
		first := snapshotOf(nil)
		current.Store(first)
		for range 1000 {
			go func() {
				if w.waitForChange(t.Context(), current.Load, addr, first) {
					woken.Add(1)
				}
			}()
		}
		synctest.Wait()
		pods := make(map[netip.Addr]*Pod)
		for other := addr.Next(); len(pods) < 100; other = other.Next() {
			pods[other] = &Pod{Name: other.String()}
			publish(snapshotOf(pods))
		}
		assert.Zero(t, woken.Load())
		pods[addr] = &Pod{Name: "mine"}
		publish(snapshotOf(pods))
		assert.EqualValues(t, 1000, woken.Load())
		assert.Empty(t, w.byAddr)
	})
}

// TestSnapshotPublishedBeforeWaiting: wake has been called already.
func TestSnapshotPublishedBeforeWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w waiters
		seen, now := snapshotOf(nil), snapshotOf(map[netip.Addr]*Pod{addr: {Name: "mine"}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		begin := time.Now()
		assert.True(t, w.waitForChange(ctx, func() *snapshot { return now }, addr, seen))
		assert.Zero(t, time.Since(begin))
		assert.False(t, w.waitForChange(ctx, func() *snapshot { return now }, addr, now), "the owner is the same")
		assert.Equal(t, time.Hour, time.Since(begin))
		assert.Empty(t, w.byAddr)
	})
}
