package upstream

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// passingSlots is how many requests are passed on at once, each on a connection of its
	// own, and tokenSlots how many more of those are for the token path, which only
	// excepted pods' are. Together with the agent's own for tokens, whose number the
	// limiter bounds, they are all that IMDS gets. It asks for 5 requests a second at
	// most, and answers in milliseconds.
	passingSlots = 32
	tokenSlots   = 8
	// slotPatience is how long a request waits for its slot.
	slotPatience = 5 * time.Second
)

// slots are for requests that are passed on: so many at once, and when more come, one
// address after the other, each in the order in which its own came.
type slots struct {
	size int

	mu       sync.Mutex // guards all below
	inUse    int
	waiting  map[netip.Addr][]chan struct{} // closed to hand over a slot; none of them empty
	rotation []netip.Addr                   // the addresses that wait, the next first
}

func newSlots(size int) *slots {
	return &slots{size: size, waiting: make(map[netip.Addr][]chan struct{})}
}

// acquire waits for a slot, for slotPatience at most; release gives it back, and must be
// called once.
func (s *slots) acquire(ctx context.Context, from netip.Addr) (release func(), err error) {
	s.mu.Lock()
	if s.inUse < s.size {
		s.inUse++
		s.mu.Unlock()
		return s.release, nil
	}
	ready := make(chan struct{})
	if len(s.waiting[from]) == 0 {
		s.rotation = append(s.rotation, from)
	}
	s.waiting[from] = append(s.waiting[from], ready)
	s.mu.Unlock()

	patience := time.NewTimer(slotPatience)
	defer patience.Stop()
	select {
	case <-ready:
		return s.release, nil
	case <-patience.C:
		err = fmt.Errorf("%d requests are being passed on already", s.size)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if !s.leave(from, ready) { // it has been handed one meanwhile
		s.release()
	}
	return nil, err
}

// leave takes a request out of the queue, and reports whether it was still there.
func (s *slots) leave(from netip.Addr, ready chan struct{}) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.waiting[from], ready)
	if i < 0 {
		return false
	}
	s.waiting[from] = slices.Delete(s.waiting[from], i, i+1)
	if len(s.waiting[from]) == 0 {
		delete(s.waiting, from)
		s.rotation = slices.DeleteFunc(s.rotation, func(a netip.Addr) bool { return a == from })
	}
	return true
}

// release hands the slot to the next address, or frees it.
func (s *slots) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.rotation) == 0 {
		s.inUse--
		return
	}
	from := s.rotation[0]
	s.rotation = s.rotation[1:]
	queue := s.waiting[from]
	close(queue[0])
	if queue = queue[1:]; len(queue) == 0 {
		delete(s.waiting, from)
		return
	}
	s.waiting[from] = queue
	s.rotation = append(s.rotation, from)
}
