// Package listener accepts connections from callers that may misbehave, on behalf of an
// http.Server. A caller is a source address.
//
// The life of a connection:
//
//  1. OnlyRedirected accepts it if the kernel redirected it here from the address that the
//     caller dialed (SO_ORIGINAL_DST), or if it is the node's own over loopback.
//  2. Limiter.Listener admits it within the bounds of its caller and of all, or evicts
//     another. It is now a *Conn, which handlers find by FromContext.
//  3. Conn.Read counts the lines of a request's head before net/http parses it.
//  4. Limiter.ConnState holds a request back while its caller has had more than its share.
//  5. Conn.Write disconnects slow readers.
//  6. Conn.Close keeps the place taken until the kernel holds nothing of the connection.
//
// What each connection may hold, and what that comes to, is in docs/security.md, Memory.
package listener

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Limiter bounds how many connections are open, of each caller and in all. One too many of a
// caller evicts the caller's longest idle one, and is refused if none is idle. One too many
// in all evicts one of the caller that has the most: an idle one, or, for a caller that has
// fewer, even a busy one, so that callers that keep all of theirs busy do not lock others
// out. A Limiter also shares the CPU between callers, see pace.
type Limiter struct {
	total, perCaller int

	mu       sync.Mutex // guards all below, and the same in each Conn
	open     int
	callers  map[netip.Addr]*caller
	draining bool // see Drain
	empty    chan struct{}
	pace     pace

	refused, evicted atomic.Uint64
}

// caller is all that is kept of an address. It is forgotten when it has neither connections
// nor acquired requests, and its share of the CPU no longer differs from a new one.
type caller struct {
	addr     netip.Addr
	conns    list.List // of *Conn; the one whose last request came or ended first is in front
	acquired int       // requests, see Conn.Acquire
	share    share
}

// NewLimiter returns a Limiter of so many connections in all, and of one caller.
func NewLimiter(total, perCaller int) *Limiter {
	return &Limiter{total: total, perCaller: perCaller, callers: make(map[netip.Addr]*caller), pace: newPace()}
}

// Listener wraps a listener so that the connections that it accepts are within the bounds, and
// of type *Conn.
func (l *Limiter) Listener(ln net.Listener) net.Listener { return &limitListener{ln, l} }

type limitListener struct {
	net.Listener
	limiter *Limiter
}

// Accept implements net.Listener.
func (ln *limitListener) Accept() (net.Conn, error) {
	for {
		accepted, err := ln.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if admitted := ln.limiter.admit(accepted); admitted != nil {
			return admitted, nil
		}
		ln.limiter.refused.Add(1)
		reset(accepted)
	}
}

// admit makes a connection a *Conn; it returns nil if there is no place for it.
func (l *Limiter) admit(accepted net.Conn) net.Conn {
	addr := addrOf(accepted.RemoteAddr())
	l.mu.Lock()
	defer l.mu.Unlock()
	from := l.callers[addr]
	if from == nil {
		from = &caller{addr: addr}
	}
	switch {
	case from.conns.Len() >= l.perCaller:
		if !l.evictLocked(from.idle()) {
			return nil
		}
	case l.open >= l.total:
		most := l.largestLocked()
		victim := most.idle()
		if victim == nil && from.conns.Len()+1 < most.conns.Len() {
			victim = most.conns.Front()
		}
		if !l.evictLocked(victim) {
			return nil
		}
	}
	admitted := &Conn{Conn: accepted, limiter: l, caller: from, next: true, gone: make(chan struct{})}
	admitted.reader = newReader(admitted)
	admitted.place = from.conns.PushBack(admitted)
	admitted.delay = l.delayLocked(from, connectionCost, time.Now())
	admitted.busy = admitted.delay > 0 // or each new one would evict the last
	l.callers[addr] = from             // again, if it has just lost its last
	l.open++
	return admitted
}

// largestLocked is the caller with the most connections.
func (l *Limiter) largestLocked() (most *caller) {
	for _, c := range l.callers {
		if most == nil || c.conns.Len() > most.conns.Len() {
			most = c
		}
	}
	return most
}

// idle is the place of the connection that has been idle longest; nil if all are busy.
func (c *caller) idle() *list.Element {
	for place := c.conns.Front(); place != nil; place = place.Next() {
		if !connAt(place).busy {
			return place
		}
	}
	return nil
}

func connAt(place *list.Element) *Conn { return place.Value.(*Conn) } //nolint:errcheck // nothing else is in a caller's conns

// evictLocked resets the connection at a place, and reports whether there was one.
func (l *Limiter) evictLocked(place *list.Element) bool {
	if place == nil {
		return false
	}
	victim := connAt(place)
	l.evicted.Add(1)
	l.untrackLocked(victim)
	reset(victim.Conn)
	return true
}

// untrackLocked gives a connection's place back, once, and ends its requests: nobody waits for
// their responses any more.
func (l *Limiter) untrackLocked(c *Conn) {
	if c.place == nil {
		return
	}
	close(c.gone)
	if c.cancel != nil { // else it has not reached an http.Server
		c.cancel()
	}
	c.caller.conns.Remove(c.place)
	c.place = nil
	l.open--
	l.forgetLocked(c.caller, time.Now())
	l.checkEmptyLocked()
}

// forgetLocked drops what is kept of a caller, unless it is still needed.
func (l *Limiter) forgetLocked(c *caller, now time.Time) {
	if c.conns.Len() == 0 && c.acquired == 0 && l.pace.forgets(&c.share, now) && l.callers[c.addr] == c {
		delete(l.callers, c.addr)
	}
}

// setIdle notes that a connection has no request. It is the last of its caller to be evicted,
// until it has been idle for longer than others.
func (l *Limiter) setIdle(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy = false
	if c.place != nil {
		c.caller.conns.MoveToBack(c.place)
	}
}

// setBusy notes that a request has come on a connection, and returns how long it must wait
// for the requests of other callers.
func (l *Limiter) setBusy(c *Conn) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.busy = true
	return l.delayLocked(c.caller, serverCost*(1+c.head.size>>10), time.Now())
}

// nextRequest is setBusy for a request that Next has read by now. A connection whose request need
// not wait stays idle: the response takes no time.
func (l *Limiter) nextRequest(c *Conn, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.place != nil {
		c.caller.conns.MoveToBack(c.place)
	}
	delay := l.delayLocked(c.caller, 1, now)
	c.busy = delay > 0
	return delay
}

// setReader notes who reads a connection: Next, or an http.Server.
func (l *Limiter) setReader(c *Conn, next bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.next, c.busy = next, false
	if c.place != nil {
		c.caller.conns.MoveToBack(c.place)
	}
}

// EndNext makes Next return an error on all connections that wait for a request.
func (l *Limiter) EndNext() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, from := range l.callers {
		for place := from.conns.Front(); place != nil; place = place.Next() {
			if c := connAt(place); c.next {
				_ = c.SetReadDeadline(time.Unix(1, 0))
			}
		}
	}
}

// connKey finds the *Conn of a request in its context.
type connKey struct{}

// ConnContext is for http.Server's field of this name, which FromContext needs.
func (l *Limiter) ConnContext(ctx context.Context, nc net.Conn) context.Context {
	c, ok := nc.(*Conn)
	if !ok {
		return ctx
	}
	ctx, cancel := context.WithCancel(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.cancel = cancel; c.place == nil { // evicted meanwhile
		cancel()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// FromContext returns the connection that a request came on; nil if that is not a Limiter's.
func FromContext(ctx context.Context) *Conn {
	c, _ := ctx.Value(connKey{}).(*Conn)
	return c
}

// ConnState is for http.Server's field of this name. A connection whose header is still
// coming is idle: to http.Server it is active when that is in, and a client that sends it
// slowly keeps no place.
func (l *Limiter) ConnState(nc net.Conn, state http.ConnState) {
	c, ok := nc.(*Conn)
	if !ok {
		return
	}
	switch state {
	case http.StateActive:
		c.startRequest()
		c.pause(l.setBusy(c))
	case http.StateIdle:
		c.endRequest()
		l.setIdle(c)
	}
}

// Drain makes Conn.Close wait for no client from now on. The channel that it returns is closed
// when no connection is open. No more may be accepted.
func (l *Limiter) Drain() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	empty := make(chan struct{})
	l.draining, l.empty = true, empty
	l.checkEmptyLocked()
	return empty
}

func (l *Limiter) checkEmptyLocked() {
	if l.open == 0 && l.empty != nil {
		close(l.empty)
		l.empty = nil
	}
}

// Stats are the connections of a Limiter.
type Stats struct {
	Open    int    // now
	Busy    int    // of these, with a request
	Refused uint64 // reset on arrival, so far
	Evicted uint64 // reset to make room for others, so far
}

// Stats returns what has been counted so far.
func (l *Limiter) Stats() Stats {
	stats := Stats{Refused: l.refused.Load(), Evicted: l.evicted.Load()}
	l.mu.Lock()
	defer l.mu.Unlock()
	stats.Open = l.open
	for _, c := range l.callers {
		for place := c.conns.Front(); place != nil; place = place.Next() {
			if connAt(place).busy {
				stats.Busy++
			}
		}
	}
	return stats
}
