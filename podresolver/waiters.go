package podresolver

import (
	"context"
	"net/netip"
	"sync"
)

// waiters are the requests that wait until the owner of an address changes. Those for one
// address share a channel; changes of other addresses do not wake them.
type waiters struct {
	mu     sync.Mutex // guards the map and its values
	byAddr map[netip.Addr]*waiter
}

type waiter struct {
	changed  chan struct{}
	requests int
}

// waitForChange waits until addr has another owner than in the snapshot seen. It returns
// false if ctx ends first.
func (w *waiters) waitForChange(ctx context.Context, current func() *snapshot, addr netip.Addr, seen *snapshot) bool {
	w.mu.Lock()
	// wake has already been called for a snapshot that was published in the meantime.
	if current().byAddr[addr] != seen.byAddr[addr] {
		w.mu.Unlock()
		return true
	}
	if w.byAddr == nil {
		w.byAddr = make(map[netip.Addr]*waiter)
	}
	shared := w.byAddr[addr]
	if shared == nil {
		shared = &waiter{changed: make(chan struct{})}
		w.byAddr[addr] = shared
	}
	shared.requests++
	w.mu.Unlock()

	select {
	case <-shared.changed:
		return true
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if shared.requests--; shared.requests == 0 && w.byAddr[addr] == shared {
		delete(w.byAddr, addr)
	}
	return false
}

// wake wakes the requests for addresses whose owner has changed, after a new snapshot is
// published.
func (w *waiters) wake(before, after *snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for addr, waiter := range w.byAddr {
		if before.byAddr[addr] != after.byAddr[addr] {
			close(waiter.changed)
			delete(w.byAddr, addr)
		}
	}
}
