package tokencache

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// window is what the upstream counts its requests by.
const window = time.Second

// turns hands out what the upstream allows: so many requests a second, so many at
// once. Callers who wait are served in rounds, one request each, so that one who
// wants much makes nobody wait longer than a round.
//
// A request counts as made for one second from when its answer is in: wherever on
// the way it was noticed, no window of a second then has more of them than allowed.
type turns struct {
	perSecond, atOnce int

	mu     sync.Mutex // guards all below
	issued uint64     // tickets
	out    int        // requests under way
	slots  []time.Time
	// quiet is until when the upstream wants to be left alone.
	quiet time.Time
	lines map[netip.Addr][]*ticket // who waits; an empty line leaves in its turn
	round []netip.Addr             // the callers that have a line, the next first
	alarm *time.Timer              // for when time alone lets somebody go
}

// ticket is one flight's place in the lines of all callers who want it.
type ticket struct {
	number  uint64 // orders a caller's line; a flight that tries again is ahead of newer ones
	callers []netip.Addr
	ready   chan struct{} // closed when it is its turn; nil when it does not wait
	called  bool          // it has had a turn
}

func newTurns(perSecond, atOnce int) *turns {
	return &turns{
		perSecond: perSecond, atOnce: atOnce,
		slots: make([]time.Time, perSecond), // when each can be used again, the first first; those under way are not there
		lines: make(map[netip.Addr][]*ticket),
	}
}

// wanted notes that a caller wants the ticket's flight, so that its turn is the
// earliest of all their turns.
func (t *turns) wanted(k *ticket, caller netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.Contains(k.callers, caller) {
		return
	}
	if len(k.callers) == 0 {
		t.issued++
		k.number = t.issued
	}
	k.callers = append(k.callers, caller)
	if k.ready != nil {
		t.line(k, caller)
	}
}

// hadTurn reports whether the ticket has been called up once.
func (t *turns) hadTurn(k *ticket) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return k.called
}

// wait returns when it is the ticket's turn, which done ends. Where the upstream wants
// to be left alone for longer than anybody waits, that is an error at once.
func (t *turns) wait(ctx context.Context, k *ticket) error {
	t.mu.Lock()
	if quiet := time.Until(t.quiet); quiet > maxWait {
		t.mu.Unlock()
		return throttledError(quiet)
	}
	ready := make(chan struct{})
	k.ready = ready
	for _, caller := range k.callers {
		t.line(k, caller)
	}
	t.callUp()
	t.mu.Unlock()

	select {
	case <-ready:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if k.ready == nil { // called up in the same moment
		t.end(0)
	} else {
		t.leave(k)
	}
	return ctx.Err()
}

// done ends a turn; see Turn.
func (t *turns) done(leaveAlone time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end(leaveAlone)
}

func (t *turns) end(leaveAlone time.Duration) {
	now := time.Now()
	t.out--
	t.slots = append(t.slots, now.Add(window))
	if until := now.Add(leaveAlone); leaveAlone > 0 && until.After(t.quiet) {
		t.quiet = until
	}
	t.callUp()
}

// line puts a ticket into a caller's line.
func (t *turns) line(k *ticket, caller netip.Addr) {
	line, ok := t.lines[caller]
	if !ok {
		t.round = append(t.round, caller)
	}
	at, _ := slices.BinarySearchFunc(line, k, func(a, b *ticket) int { return cmp.Compare(a.number, b.number) })
	t.lines[caller] = slices.Insert(line, at, k)
}

// leave takes a ticket out of all lines.
func (t *turns) leave(k *ticket) {
	k.ready = nil
	for _, caller := range k.callers {
		line := t.lines[caller]
		if i := slices.Index(line, k); i >= 0 {
			t.lines[caller] = slices.Delete(line, i, i+1)
		}
	}
}

// callUp lets go as many as may go now, and sets the alarm for the next.
func (t *turns) callUp() {
	for t.out < t.atOnce && len(t.slots) > 0 && len(t.round) > 0 {
		free := t.slots[0]
		if t.quiet.After(free) {
			free = t.quiet
		}
		if wait := time.Until(free); wait > 0 {
			if t.alarm == nil {
				t.alarm = time.AfterFunc(wait, t.ring)
			} else {
				t.alarm.Reset(wait)
			}
			return
		}
		caller := t.round[0]
		t.round = t.round[1:]
		line := t.lines[caller]
		if len(line) == 0 {
			delete(t.lines, caller)
			continue
		}
		t.round = append(t.round, caller)
		k := line[0]
		ready := k.ready
		t.leave(k)
		k.called = true
		t.slots = t.slots[1:]
		t.out++
		close(ready)
	}
}

func (t *turns) ring() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.callUp()
}

// stop ends the alarm.
func (t *turns) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.alarm != nil {
		t.alarm.Stop()
	}
}

// backlog is about how long who comes now would wait for the end of the lines.
func (t *turns) backlog() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	waiting := 0
	for _, line := range t.lines {
		waiting += len(line)
	}
	return max(time.Until(t.quiet), time.Duration(waiting)*window/time.Duration(t.perSecond))
}

// throttledError is how long the upstream wants to be left alone by all.
type throttledError time.Duration

func (e throttledError) Error() string {
	return fmt.Sprintf("the upstream is throttling this node for another %s", time.Duration(e).Round(time.Second))
}

// Class implements what Fetch's errors may say.
func (e throttledError) Class() Class { return Throttled }

// Wait implements what Fetch's errors may say.
func (e throttledError) Wait() time.Duration { return time.Duration(e) }
