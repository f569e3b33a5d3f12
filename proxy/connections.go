package proxy

import (
	"container/list"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
)

// What a Config that leaves them out has.
const (
	// DefaultMaxConnections is eight for each of 250 pods. When all are open they take
	// 20 MB if they are silent, and 50 MB if all of them send.
	DefaultMaxConnections       = 2048
	DefaultMaxConnectionsPerPod = 512
)

// connections bounds how many are open, from each address and in all. One too many from
// an address takes the place of an idle one of the same address; where none is idle it is
// closed. One too many in all takes a place of the address that has the most: an idle
// one's, or from an address that has fewer even one in use, lest a few that keep all
// of theirs in use lock the others out.
type connections struct {
	perPod, total int

	mu     sync.Mutex // guards all below
	open   int
	byAddr map[netip.Addr]*crowd // none of them empty

	refused, ended atomic.Uint64
}

// crowd is the connections from one address: of *conn, and in front the one that has had
// nothing new to do for longest.
type crowd struct{ list.List }

// conn is a connection that is counted until it is closed.
type conn struct {
	net.Conn
	all  *connections
	from netip.Addr

	// Guarded by connections.mu.
	place *list.Element // in its crowd; nil once it is closed
	busy  bool

	handled atomic.Bool // the request under way is a handler's; see handling
	refused bool        // http.Server has refused a request by itself
}

func newConnections(perPod, total int) *connections {
	if perPod <= 0 {
		perPod = DefaultMaxConnectionsPerPod
	}
	if total <= 0 {
		total = DefaultMaxConnections
	}
	return &connections{perPod: perPod, total: total, byAddr: make(map[netip.Addr]*crowd)}
}

// limit wraps a listener so that what it accepts is within the bounds.
func (c *connections) limit(ln net.Listener) net.Listener { return &limited{ln, c} }

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
		cut(accepted)
	}
}

// admit counts a connection in, and returns nil if there is no place for it.
func (c *connections) admit(accepted net.Conn) net.Conn {
	from := sourceOf(accepted.RemoteAddr())
	c.mu.Lock()
	defer c.mu.Unlock()
	own := c.byAddr[from]
	if own == nil {
		own = new(crowd)
	}
	switch {
	case own.Len() >= c.perPod:
		if !c.end(own.idle()) {
			return nil
		}
	case c.open >= c.total:
		most := c.largest()
		victim := most.idle()
		if victim == nil && own.Len()+1 < most.Len() {
			victim = most.Front()
		}
		if !c.end(victim) {
			return nil
		}
	}
	admitted := &conn{Conn: accepted, all: c, from: from}
	admitted.place = own.PushBack(admitted)
	c.byAddr[from] = own // again, if it has just lost its last
	c.open++
	return admitted
}

// largest is the crowd with the most connections. mu is held.
func (c *connections) largest() (most *crowd) {
	for _, one := range c.byAddr {
		if most == nil || one.Len() > most.Len() {
			most = one
		}
	}
	return most
}

// idle is the place of the connection that has been idle longest; nil if none is.
func (own *crowd) idle() *list.Element {
	for place := own.Front(); place != nil; place = place.Next() {
		if !at(place).busy {
			return place
		}
	}
	return nil
}

func at(place *list.Element) *conn { return place.Value.(*conn) } //nolint:errcheck // nothing else is in a crowd

// end closes the connection at a place, and reports whether there was one. mu is held.
func (c *connections) end(place *list.Element) bool {
	if place == nil {
		return false
	}
	victim := at(place)
	c.ended.Add(1)
	c.forget(victim)
	cut(victim.Conn)
	return true
}

// forget counts a connection out. mu is held.
func (c *connections) forget(one *conn) {
	if one.place == nil {
		return
	}
	own := c.byAddr[one.from]
	own.Remove(one.place)
	one.place = nil
	c.open--
	if own.Len() == 0 {
		delete(c.byAddr, one.from)
	}
}

// Close implements net.Conn.
func (one *conn) Close() error {
	one.all.mu.Lock()
	one.all.forget(one)
	one.all.mu.Unlock()
	return one.Conn.Close()
}

// CloseWrite lets http.Server end a connection such that the client can read what it
// was told.
func (one *conn) CloseWrite() error {
	if half, ok := one.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// changed is called by http.Server when the state of a connection changes. One whose header
// is still coming is idle: it is active for http.Server when that is in, and who sends it
// slowly keeps no place.
func (c *connections) changed(nc net.Conn, state http.ConnState) {
	one, ok := nc.(*conn)
	if !ok {
		return
	}
	if state == http.StateIdle {
		one.handled.Store(false)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if one.place == nil {
		return
	}
	switch state {
	case http.StateActive:
		one.busy = true
	case http.StateIdle:
		one.busy = false
		c.byAddr[one.from].MoveToBack(one.place)
	}
}

// cut closes a connection with a reset, so that nothing of it stays in the kernel.
func cut(c net.Conn) {
	if tcp, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close() // nobody can be told
}

// sourceOf is the address at the other end; the zero one if it is not a TCP connection.
func sourceOf(addr net.Addr) netip.Addr {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// ConnectionStats are counts since New, and how many connections there are now.
type ConnectionStats struct {
	Open    int
	Refused uint64 // closed on arrival
	Ended   uint64 // closed to make place
}

// Connections returns what has been counted so far.
func (s *Server) Connections() ConnectionStats {
	c := s.connections
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	return ConnectionStats{Open: open, Refused: c.refused.Load(), Ended: c.ended.Load()}
}
