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

// connections bounds how many are open, from each address and in all. One too many
// takes the place of an idle one: of the same address if that has too many, else of the
// address that has the most. Where none is idle the new one is closed.
type connections struct {
	perPod, total int

	mu     sync.Mutex // guards all below
	open   int
	byAddr map[netip.Addr]*crowd

	refused, ended atomic.Uint64
}

// crowd is the connections from one address.
type crowd struct {
	open int
	idle list.List // of *conn, the one that has been idle longest in front
}

// conn is a connection that is counted until it is closed.
type conn struct {
	net.Conn
	all    *connections
	from   netip.Addr
	place  *list.Element // among the idle ones; guarded by connections.mu
	closed bool          // guarded by connections.mu

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
	switch {
	case own != nil && own.open >= c.perPod:
		if !c.endIdle(own) {
			return nil
		}
	case c.open >= c.total:
		if !c.endIdle(c.largest()) {
			return nil
		}
	}
	if own = c.byAddr[from]; own == nil { // endIdle may have ended its last
		own = new(crowd)
		c.byAddr[from] = own
	}
	own.open++
	c.open++
	admitted := &conn{Conn: accepted, all: c, from: from}
	admitted.place = own.idle.PushBack(admitted)
	return admitted
}

// largest is the crowd with the most connections. mu is held.
func (c *connections) largest() (most *crowd) {
	for _, one := range c.byAddr {
		if most == nil || one.open > most.open {
			most = one
		}
	}
	return most
}

// endIdle closes the connection of a crowd that has been idle longest, and reports
// whether there was one. mu is held.
func (c *connections) endIdle(of *crowd) bool {
	first := of.idle.Front()
	if first == nil {
		return false
	}
	victim := first.Value.(*conn) //nolint:errcheck // nothing else is in that list
	c.ended.Add(1)
	c.forget(victim)
	cut(victim.Conn)
	return true
}

// forget counts a connection out. mu is held.
func (c *connections) forget(one *conn) {
	if one.closed {
		return
	}
	one.closed = true
	c.open--
	own := c.byAddr[one.from]
	own.open--
	if one.place != nil {
		own.idle.Remove(one.place)
		one.place = nil
	}
	if own.open == 0 {
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

// changed is called by http.Server when the state of a connection changes: only one that
// has no request with a whole header under way may be ended for another. One whose header
// is coming may be: it is active for http.Server when that is in, and who sends it slowly
// keeps no place.
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
	if one.closed {
		return
	}
	own := c.byAddr[one.from]
	switch {
	case state == http.StateActive && one.place != nil:
		own.idle.Remove(one.place)
		one.place = nil
	case state == http.StateIdle && one.place == nil:
		one.place = own.idle.PushBack(one)
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
	Ended   uint64 // closed while idle, to make place
}

// Connections returns what has been counted so far.
func (s *Server) Connections() ConnectionStats {
	c := s.connections
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	return ConnectionStats{Open: open, Refused: c.refused.Load(), Ended: c.ended.Load()}
}
