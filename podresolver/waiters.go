package podresolver

import (
	"context"
	"net/netip"
	"sync"
)

// waiting are the requests that wait for the owner of an address to change. Those
// for one address share a channel, and no other address's news wakes them.
type waiting struct {
	mu     sync.Mutex // guards the map and what is in it
	byAddr map[netip.Addr]*waiter
}

type waiter struct {
	changed chan struct{}
	waiting int // requests
}

// forChange waits until the owner of addr is not the one that it was in the
// snapshot s. It reports false if ctx ends first.
func (w *waiting) forChange(ctx context.Context, current func() *snapshot, addr netip.Addr, s *snapshot) bool {
	w.mu.Lock()
	// A snapshot that was published since is one that nobody will be woken for.
	if current().byAddr[addr] != s.byAddr[addr] {
		w.mu.Unlock()
		return true
	}
	if w.byAddr == nil {
		w.byAddr = make(map[netip.Addr]*waiter)
	}
	mine := w.byAddr[addr]
	if mine == nil {
		mine = &waiter{changed: make(chan struct{})}
		w.byAddr[addr] = mine
	}
	mine.waiting++
	w.mu.Unlock()

	select {
	case <-mine.changed:
		return true
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if mine.waiting--; mine.waiting == 0 && w.byAddr[addr] == mine {
		delete(w.byAddr, addr)
	}
	return false
}

// wake wakes those who wait for an address whose owner changed. It comes after the
// new snapshot is published.
func (w *waiting) wake(before, after *snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for addr, waiter := range w.byAddr {
		if before.byAddr[addr] != after.byAddr[addr] {
			close(waiter.changed)
			delete(w.byAddr, addr)
		}
	}
}
