package proxy

import (
	"container/list"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of a Config that leaves them out. What each connection may hold, and what that
// comes to, is in docs/security.md, Memory.
const (
	// DefaultMaxConnections is two for each of 250 pods.
	DefaultMaxConnections       = 512
	DefaultMaxConnectionsPerPod = 64
)

// connections bounds how many are open, of each caller and in all. One too many of a caller
// evicts its longest idle one, and is refused where none is idle. One too many in all evicts
// one of the caller that has the most: an idle one, or, for a caller that has fewer, even one
// in use, so that callers that keep all of theirs in use do not lock the others out.
type connections struct {
	perCaller, total int

	mu       sync.Mutex // guards all below, and the same in each conn
	open     int
	callers  map[netip.Addr]*caller
	draining bool // Serve is about to return: Close waits for no client
	pace     pace

	refused, evicted atomic.Uint64
}

// caller is all that is kept of an address: its connections, and what bounds its requests. It
// is forgotten when it has neither, and its pace says nothing any more.
type caller struct {
	addr     netip.Addr
	conns    list.List // of *conn; in front the one that has been idle, or busy, for longest
	requests int       // that have been acquired
	share    share
}

func newConnections(perCaller, total int) *connections {
	if perCaller <= 0 {
		perCaller = DefaultMaxConnectionsPerPod
	}
	if total <= 0 {
		total = DefaultMaxConnections
	}
	return &connections{perCaller: perCaller, total: total, callers: make(map[netip.Addr]*caller)}
}

// limit wraps a listener so that what it accepts is within the bounds.
func (cs *connections) limit(ln net.Listener) net.Listener { return &limited{ln, cs} }

type limited struct {
	net.Listener
	all *connections
}

// Accept implements net.Listener.
func (l *limited) Accept() (net.Conn, error) {
	for {
		accepted, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if admitted := l.all.admit(accepted); admitted != nil {
			return admitted, nil
		}
		l.all.refused.Add(1)
		reset(accepted)
	}
}

// admit counts a connection in, and returns nil if there is no place for it.
func (cs *connections) admit(accepted net.Conn) net.Conn {
	addr := sourceOf(accepted.RemoteAddr())
	cs.mu.Lock()
	defer cs.mu.Unlock()
	from := cs.callers[addr]
	if from == nil {
		from = &caller{addr: addr}
	}
	switch {
	case from.conns.Len() >= cs.perCaller:
		if !cs.evictLocked(from.idle()) {
			return nil
		}
	case cs.open >= cs.total:
		most := cs.largestLocked()
		victim := most.idle()
		if victim == nil && from.conns.Len()+1 < most.conns.Len() {
			victim = most.conns.Front()
		}
		if !cs.evictLocked(victim) {
			return nil
		}
	}
	admitted := &conn{Conn: accepted, all: cs, caller: from}
	admitted.place = from.conns.PushBack(admitted)
	cs.callers[addr] = from // again, if it has just lost its last
	cs.open++
	return admitted
}

// largestLocked is the caller with the most connections.
func (cs *connections) largestLocked() (most *caller) {
	for _, c := range cs.callers {
		if most == nil || c.conns.Len() > most.conns.Len() {
			most = c
		}
	}
	return most
}

// idle is the place of the connection that has been idle longest; nil if all are in use.
func (c *caller) idle() *list.Element {
	for place := c.conns.Front(); place != nil; place = place.Next() {
		if !connAt(place).busy {
			return place
		}
	}
	return nil
}

func connAt(place *list.Element) *conn { return place.Value.(*conn) } //nolint:errcheck // nothing else is in a caller's conns

// evictLocked resets the connection at a place, and reports whether there was one.
func (cs *connections) evictLocked(place *list.Element) bool {
	if place == nil {
		return false
	}
	victim := connAt(place)
	cs.evicted.Add(1)
	cs.untrackLocked(victim)
	victim.end()
	reset(victim.Conn)
	return true
}

// untrackLocked counts a connection out, once.
func (cs *connections) untrackLocked(c *conn) {
	if c.place == nil {
		return
	}
	c.caller.conns.Remove(c.place)
	c.place = nil
	cs.open--
	cs.forgetLocked(c.caller, time.Now())
}

// forgetLocked drops what is kept of a caller, unless it is still of use.
func (cs *connections) forgetLocked(c *caller, now time.Time) {
	if c.conns.Len() == 0 && c.requests == 0 && cs.pace.forgets(&c.share, now) && cs.callers[c.addr] == c {
		delete(cs.callers, c.addr)
	}
}

// setBusy notes whether a connection is in use. One that is not is the last of its
// address to be evicted, until it has been idle for longer than others.
func (cs *connections) setBusy(c *conn, busy bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.busy = busy
	if c.place != nil && !busy {
		c.caller.conns.MoveToBack(c.place)
	}
}

// begin notes that a request has come on a connection, and returns how long it must wait
// for the requests of other callers.
func (cs *connections) begin(c *conn) time.Duration {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.busy = true
	return cs.delayLocked(c.caller, time.Now())
}

func (cs *connections) delayLocked(c *caller, now time.Time) time.Duration {
	if cs.pace.turn(now) {
		for _, other := range cs.callers {
			cs.forgetLocked(other, now)
		}
	}
	return cs.pace.delay(&c.share, now)
}

// acquire counts a request of the connection's caller, unless it has limit of them already.
func (c *conn) acquire(limit int) bool {
	if c == nil {
		return true
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	if c.caller.requests >= limit {
		return false
	}
	c.caller.requests++
	return true
}

// release is for each request that was acquired.
func (c *conn) release() {
	if c == nil {
		return
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.caller.requests--
	c.all.forgetLocked(c.caller, time.Now())
}

// trackState is called by http.Server when the state of a connection changes. One whose
// header is still coming is idle: it is active for http.Server when that is in, and a
// client that sends it slowly keeps no place.
func (cs *connections) trackState(nc net.Conn, state http.ConnState) {
	c, ok := nc.(*conn)
	if !ok {
		return
	}
	switch state {
	case http.StateActive:
		c.startRequest()
		if delay := cs.begin(c); delay > 0 {
			time.Sleep(delay)
		}
	case http.StateIdle:
		c.endRequest()
		cs.setBusy(c, false)
	}
}

// drain makes Close wait for no client any more.
func (cs *connections) drain() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.draining = true
}

// ConnectionStats are counts since New, and how many connections there are now.
type ConnectionStats struct {
	Open    int
	Refused uint64 // closed on arrival
	Ended   uint64 // closed to make place
}

// Connections returns what has been counted so far.
func (s *Server) Connections() ConnectionStats {
	cs := s.connections
	cs.mu.Lock()
	open := cs.open
	cs.mu.Unlock()
	return ConnectionStats{Open: open, Refused: cs.refused.Load(), Ended: cs.evicted.Load()}
}
