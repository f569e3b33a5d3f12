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

// connections bounds how many are open, from each address and in all. One too many from
// an address takes the place of an idle one of the same address; where none is idle it is
// closed. One too many in all takes a place of the address that has the most: an idle
// one's, or from an address that has fewer even one in use, lest a few that keep all
// of theirs in use lock the others out.
type connections struct {
	perPod, total int

	mu       sync.Mutex // guards all below, and the same in each conn
	open     int
	byAddr   map[netip.Addr]*source // none of them empty
	draining bool                   // Serve is about to return: Close waits for no client
	pace     pace

	refused, evicted atomic.Uint64
}

// source is the connections from one address: of *conn, and in front the one that has had
// nothing new to do for longest.
type source struct{ list.List }

func newConnections(perPod, total int) *connections {
	if perPod <= 0 {
		perPod = DefaultMaxConnectionsPerPod
	}
	if total <= 0 {
		total = DefaultMaxConnections
	}
	return &connections{perPod: perPod, total: total, byAddr: make(map[netip.Addr]*source), pace: newPace()}
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
	from := cs.byAddr[addr]
	if from == nil {
		from = new(source)
	}
	switch {
	case from.Len() >= cs.perPod:
		if !cs.evictLocked(from.idle()) {
			return nil
		}
	case cs.open >= cs.total:
		most := cs.largestLocked()
		victim := most.idle()
		if victim == nil && from.Len()+1 < most.Len() {
			victim = most.Front()
		}
		if !cs.evictLocked(victim) {
			return nil
		}
	}
	admitted := &conn{Conn: accepted, all: cs, from: addr}
	admitted.place = from.PushBack(admitted)
	cs.byAddr[addr] = from // again, if it has just lost its last
	cs.open++
	return admitted
}

// largestLocked is the address with the most connections.
func (cs *connections) largestLocked() (most *source) {
	for _, from := range cs.byAddr {
		if most == nil || from.Len() > most.Len() {
			most = from
		}
	}
	return most
}

// idle is the place of the connection that has been idle longest; nil if all are in use.
func (from *source) idle() *list.Element {
	for place := from.Front(); place != nil; place = place.Next() {
		if !connAt(place).busy {
			return place
		}
	}
	return nil
}

func connAt(place *list.Element) *conn { return place.Value.(*conn) } //nolint:errcheck // nothing else is in a source

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
	from := cs.byAddr[c.from]
	from.Remove(c.place)
	c.place = nil
	cs.open--
	if from.Len() == 0 {
		delete(cs.byAddr, c.from)
	}
}

// setBusy notes whether a connection is in use. One that is not is the last of its
// address to be evicted, until it has been idle for longer than others.
func (cs *connections) setBusy(c *conn, busy bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.busy = busy
	if c.place != nil && !busy {
		cs.byAddr[c.from].MoveToBack(c.place)
	}
}

// begin notes that a request has come on a connection, and returns how long it must wait
// for the requests of others.
func (cs *connections) begin(c *conn) time.Duration {
	now := time.Now()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.busy = true
	return cs.pace.delay(c.from, now)
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
