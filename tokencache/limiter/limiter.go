// Package limiter keeps a node within what a service allows it: so many requests a
// second, so many at once, in fair rounds between the callers that wait.
//
// The life of a request here:
//
//  1. Acquire puts it into the queue, on behalf of all callers that want its answer.
//     More callers may come to want it while it waits, so they are asked for again
//     whenever a slot becomes free.
//  2. Callers take turns, one slot each. A caller uses its turn for the oldest request
//     that it waits for, so one with many requests delays each other caller by one
//     slot a round, and a caller with a single request waits for one round at most,
//     whoever sent that request first.
//  3. When the answer is in, release frees the slot. The rate counts a request for one
//     second from then on: wherever on the way the service noticed it, no window of a
//     second has more of them than allowed. A limit of NewFromStart counts from Acquire.
//  4. A service that throttles is left alone by all for as long as it says.
package limiter

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// window is the time that the rate counts requests in.
	window = time.Second
	// maxPause bounds PauseUntil. No service says more than that.
	maxPause = time.Hour
)

// ErrTimeout means that no slot became free for as long as anybody wanted to wait.
var ErrTimeout = errors.New("no request to the service was possible in time")

// PausedError means that the service throttles the node for longer than anybody waits.
type PausedError struct {
	For time.Duration
}

func (e *PausedError) Error() string {
	return fmt.Sprintf("the service is throttling this node for another %s", e.For.Round(time.Second))
}

// Limiter gives out the slots of one service. It is safe for concurrent use.
type Limiter struct {
	mu          sync.Mutex // guards all following fields
	perSecond   int        // 0 for any number
	atOnce      int
	fromStart   bool // see NewFromStart
	inFlight    int
	available   []time.Time // when each slot of the rate may be used again, the first first; without those that counted has
	pausedUntil time.Time
	waiters     []*waiter // the oldest first
	// rotation has the place of each caller that waits. The lowest is served next,
	// and then gets lastPlace+1.
	rotation  map[netip.Addr]uint64
	lastPlace uint64
	timer     *time.Timer // for a slot that becomes available by time alone
	// settled is closed when no more than atOnce are in flight; nil unless Settle waits for that.
	settled chan struct{}
}

// waiter is a request in the queue.
type waiter struct {
	since   time.Time
	waiting func() (callers []netip.Addr, until time.Time)
	ready   chan struct{} // closed when it has a slot
}

// New returns a Limiter for a service that allows perSecond requests a second, 0 for any
// number, and atOnce of them at the same time.
func New(perSecond, atOnce int) *Limiter {
	return &Limiter{
		perSecond: perSecond, atOnce: atOnce,
		available: make([]time.Time, perSecond),
		rotation:  make(map[netip.Addr]uint64),
	}
}

// NewFromStart is New for a limit that is the node's own and not the service's: the rate counts a
// request from when it has its slot, and so does not sink with the service's latency.
func NewFromStart(perSecond, atOnce int) *Limiter {
	l := New(perSecond, atOnce)
	l.fromStart = true
	return l
}

// Acquire waits for a slot. release frees it: it must be called once, when the answer
// is in, with how long the service asks to be left alone, 0 if it does not.
//
// waiting returns the callers that want the request, one at least, and until when they
// wait. It is called often, must not block, and may return more callers and a later time
// than before. since orders the requests of one caller, so that one that is tried again
// keeps its place.
//
// The error is ErrTimeout, a *PausedError, or ctx's.
func (l *Limiter) Acquire(ctx context.Context, since time.Time, waiting func() (callers []netip.Addr, until time.Time)) (release func(retryAfter time.Duration), err error) {
	_, until := waiting()
	w := &waiter{since: since, waiting: waiting, ready: make(chan struct{})}
	l.mu.Lock()
	if l.pausedUntil.After(until) {
		defer l.mu.Unlock()
		return nil, &PausedError{time.Until(l.pausedUntil)}
	}
	i, _ := slices.BinarySearchFunc(l.waiters, w, func(a, b *waiter) int {
		if a.since.After(b.since) {
			return 1
		}
		return -1 // after those of the same age
	})
	l.waiters = slices.Insert(l.waiters, i, w)
	l.dispatchLocked()
	l.mu.Unlock()

	timeout := time.NewTimer(time.Until(until))
	defer timeout.Stop()
	for {
		select {
		case <-w.ready:
			return l.release, nil
		case <-ctx.Done():
			if !l.remove(w) { // it got its slot at the same moment
				l.release(0)
			}
			return nil, ctx.Err()
		case <-timeout.C:
			if _, until = waiting(); time.Now().Before(until) { // more callers have come
				timeout.Reset(time.Until(until))
			} else if l.remove(w) {
				return nil, ErrTimeout
			}
		}
	}
}

// remove takes a waiter out of the queue, and reports whether it was still there.
func (l *Limiter) remove(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.waiters, w)
	if i < 0 {
		return false
	}
	l.waiters = slices.Delete(l.waiters, i, i+1)
	return true
}

func (l *Limiter) release(retryAfter time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.inFlight--; l.perSecond > 0 && !l.fromStart {
		l.addSlotsLocked(now, 1)
	}
	if retryAfter > 0 {
		l.pauseLocked(now.Add(retryAfter))
	}
	l.settleLocked()
	l.dispatchLocked()
}

// SetLimits changes the limits of New, for requests that have no slot yet; see Settle for the
// others. For a second none of the slots that are new is used: another agent of the node may just
// have used them.
func (l *Limiter) SetLimits(perSecond, atOnce int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.perSecond, l.atOnce = perSecond, atOnce
	l.addSlotsLocked(time.Now(), max(0, perSecond-l.countedLocked()-len(l.available)))
	l.settleLocked()
	l.dispatchLocked()
}

// Settle waits until no more requests are in flight than SetLimits allows at once, or until ctx
// ends, whose error it returns.
func (l *Limiter) Settle(ctx context.Context) error {
	l.mu.Lock()
	if l.settled == nil {
		l.settled = make(chan struct{})
	}
	settled := l.settled
	l.settleLocked()
	l.mu.Unlock()
	select {
	case <-settled:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *Limiter) settleLocked() {
	if l.settled != nil && l.inFlight <= l.atOnce {
		close(l.settled)
		l.settled = nil
	}
}

// addSlotsLocked adds slots of the rate that have been used until now. Where that makes too many,
// those that would be available first go.
func (l *Limiter) addSlotsLocked(now time.Time, n int) {
	for range n {
		l.available = append(l.available, now.Add(window))
	}
	excess := l.countedLocked() + len(l.available) - l.perSecond
	l.available = l.available[min(max(0, excess), len(l.available)):]
}

// countedLocked returns how many slots of the rate are used by requests in flight.
func (l *Limiter) countedLocked() int {
	if l.fromStart {
		return 0
	}
	return l.inFlight
}

// dispatchLocked gives out the slots that are free now, and sets the timer for the next.
func (l *Limiter) dispatchLocked() {
	for l.inFlight < l.atOnce && len(l.waiters) > 0 && (l.perSecond == 0 || len(l.available) > 0) {
		at := l.pausedUntil
		if l.perSecond > 0 && l.available[0].After(at) {
			at = l.available[0]
		}
		if wait := time.Until(at); wait > 0 {
			if l.timer == nil {
				l.timer = time.AfterFunc(wait, l.dispatch)
			} else {
				l.timer.Reset(wait)
			}
			return
		}
		i := l.nextLocked()
		close(l.waiters[i].ready)
		l.waiters = slices.Delete(l.waiters, i, i+1)
		if l.inFlight++; l.perSecond > 0 {
			if l.available = l.available[1:]; l.fromStart {
				l.addSlotsLocked(time.Now(), 1)
			}
		}
	}
}

func (l *Limiter) dispatch() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatchLocked()
}

// nextLocked returns the index of the waiter to be served next, and moves the caller
// whose turn that is to the end of the rotation. It looks at all waiters: there are some
// thousand at most (a caller's fetches are bounded), and slots come a few times a second.
func (l *Limiter) nextLocked() (next int) {
	var turn netip.Addr
	rotation := make(map[netip.Addr]uint64, len(l.rotation)) // without callers that wait no more
	for i, w := range l.waiters {
		callers, _ := w.waiting()
		for _, caller := range callers {
			if _, ok := rotation[caller]; ok {
				continue // it has an older one
			}
			place, ok := l.rotation[caller]
			if !ok {
				l.lastPlace++
				place = l.lastPlace
			}
			if rotation[caller] = place; place < rotation[turn] || len(rotation) == 1 {
				next, turn = i, caller
			}
		}
	}
	l.lastPlace++
	rotation[turn] = l.lastPlace
	l.rotation = rotation
	return next
}

// Backlog returns about how long a request that came now would wait for the rate.
func (l *Limiter) Backlog() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(time.Until(l.pausedUntil), time.Duration(len(l.waiters))*window/time.Duration(max(l.perSecond, 1)))
}

// PausedUntil returns until when the service asked to be left alone, the zero time or
// one in the past if it does not.
func (l *Limiter) PausedUntil() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pausedUntil
}

// PauseUntil lets no request through until then, and shortens no pause. It is bounded
// to an hour from now.
func (l *Limiter) PauseUntil(until time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pauseLocked(until)
}

func (l *Limiter) pauseLocked(until time.Time) {
	now := time.Now()
	until = now.Add(min(until.Sub(now), maxPause)) // by the monotonic clock
	if until.After(l.pausedUntil) {
		l.pausedUntil = until
	}
}
