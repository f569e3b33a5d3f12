package testbed

import (
	"net/netip"
	"sync"
)

// PodList is what an agent knows of its node's pods.
type PodList struct {
	mu      sync.Mutex // guards both
	addrs   []netip.Addr
	changed chan struct{}
}

// Addresses returns the pods' addresses, and a channel that is closed by the next Set.
func (l *PodList) Addresses() ([]netip.Addr, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.addrs, l.changed
}

// Set replaces the addresses.
func (l *PodList) Set(addrs ...netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addrs = addrs
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}
