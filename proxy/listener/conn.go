package listener

import (
	"container/list"
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

const (
	// writeTimeout bounds each write of a response, which then fails, as do all after it. It
	// is also how long a closed connection is kept for a client that has not taken all.
	writeTimeout = 5 * time.Second
	// maxIgnored is how much is read of a client whose connection ends.
	maxIgnored = 8 << 10
)

// loopback is the one address that both ends of the node's own connections have. No pod's
// packet gets in with it: the kernel takes no packet from outside that comes from an
// address of its own (fib_validate_source).
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// Conn is a connection that a Limiter has admitted. It keeps its place until the kernel, too,
// holds nothing of it. Of a nil *Conn, as of requests in tests, nothing is known or bounded.
type Conn struct {
	net.Conn
	limiter *Limiter
	caller  *caller
	// gone is closed when the connection has lost its place.
	gone chan struct{}
	// delay is how long its first request has to wait, see pace. Only the goroutine that
	// serves the connection uses it, as the next ones.
	delay time.Duration
	// ingress is what Ingress returned.
	ingress      int
	ingressKnown bool

	// Guarded by limiter.mu.
	place *list.Element // in caller.conns; nil once it is given back
	busy  bool          // it has a request, or one is held back
	next  bool          // it is read by Next
	// cancel ends the context of the connection's requests. http.Server does that when it
	// notices that the client has gone, and it does not look out for that while there is
	// something unread, such as a body that nobody wants.
	cancel context.CancelFunc

	// The request under way. These are written by the goroutine that serves the connection;
	// the atomic ones are read by the one that looks out for the client's end, too.
	inBody    atomic.Bool // its head has been read
	wantBody  atomic.Bool // see WantBody
	head      headReader
	pipelined bool
	writeBy   time.Time // see SetResponseDeadline

	failed atomic.Bool // a write has

	reader reader // see Next
}

// Caller is the address that the connection came from; the zero one if it is not TCP.
func (c *Conn) Caller() netip.Addr {
	if c == nil {
		return netip.Addr{}
	}
	return c.caller.addr
}

// Peer is the address and port at the other end, which for a connection of OnlyIdentified is not
// RemoteAddr; nil if that is not known.
func (c *Conn) Peer() net.Addr {
	if c == nil {
		return nil
	}
	if identified, ok := c.Conn.(*identifiedConn); ok {
		return identified.TCPConn.RemoteAddr()
	}
	return c.RemoteAddr()
}

// Acquire counts a request of the connection's caller, unless the caller has limit of them
// already. Each that was acquired must be released.
func (c *Conn) Acquire(limit int) bool {
	if c == nil {
		return true
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	if c.caller.acquired >= limit {
		return false
	}
	c.caller.acquired++
	return true
}

// Release ends what Acquire began.
func (c *Conn) Release() {
	if c == nil {
		return
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.caller.acquired--
	c.limiter.forgetLocked(c.caller, time.Now())
}

// Head is the head of the request under way, byte for byte; nil if it has more than MaxHead. It
// is valid until the response is complete. After a request with a body it may be wrong.
func (c *Conn) Head() []byte {
	if c == nil || c.head.size != len(c.head.kept) {
		return nil
	}
	return c.head.kept
}

// Pipelined reports whether the client has ever sent a request before it had the last response.
func (c *Conn) Pipelined() bool { return c != nil && c.pipelined }

// WantBody says that the body of the request will be read. Otherwise only http.Server reads
// it, to find its end, and it may have no more lines than a head.
func (c *Conn) WantBody() {
	if c != nil {
		c.wantBody.Store(true)
	}
}

// SetResponseDeadline bounds the rest of the response, instead of the 5 s for each write.
func (c *Conn) SetResponseDeadline(t time.Time) {
	if c != nil {
		c.writeBy = t
	}
}

// Loopback reports whether the connection is the node's own, from 127.0.0.1 to 127.0.0.1.
func (c *Conn) Loopback() bool {
	return c != nil && isLoopback(c.Conn)
}

func isLoopback(c net.Conn) bool {
	return addrOf(c.RemoteAddr()) == loopback && addrOf(c.LocalAddr()) == loopback
}

// Ingress is the index of the interface that the connection came in over; 0 if that is not
// known. The kernel is asked once.
func (c *Conn) Ingress() int {
	if c == nil {
		return 0
	}
	if !c.ingressKnown {
		c.ingressKnown = true
		if index, err := ingressOf(c.Conn); err == nil {
			c.ingress = index
		}
	}
	return c.ingress
}

// SocketUID is the user whose process has the socket at the other end of a Loopback
// connection, which must be open there.
func (c *Conn) SocketUID() (uint32, error) {
	if c == nil {
		return 0, errors.New("not a TCP connection")
	}
	return socketUID(c.RemoteAddr(), c.LocalAddr())
}

// startRequest notes that http.Server has parsed a head: what follows is the body.
func (c *Conn) startRequest() {
	c.pipelined = c.pipelined || len(c.head.ahead) > 0 // before net/http reads on, in another goroutine
	c.wantBody.Store(false)
	c.inBody.Store(true)
}

// endRequest notes that the next thing to read is a head.
func (c *Conn) endRequest() {
	c.inBody.Store(false)
	c.head.begin()
	c.writeBy = time.Time{}
	if len(c.head.ahead) > 0 {
		c.pause(pipelinedPause)
	}
}

// pause waits for as long, or until the connection is evicted.
func (c *Conn) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.gone:
	}
}

// awaitAdmission holds the first request of a connection back for as long as its caller has
// had more than its share.
func (c *Conn) awaitAdmission() {
	if c.delay > 0 {
		c.pause(c.delay)
		c.delay = 0
		c.limiter.setIdle(c)
	}
}

// Read implements net.Conn. It returns no more than the rest of a head, so that no head is
// parsed before its lines have been counted.
func (c *Conn) Read(p []byte) (int, error) {
	c.awaitAdmission()
	if c.inBody.Load() {
		return c.head.readBody(c.Conn, p, c.wantBody.Load())
	}
	return c.head.read(c.Conn, p)
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	by := c.writeBy
	if by.IsZero() {
		by = time.Now().Add(writeTimeout)
	}
	if err := c.SetWriteDeadline(by); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		c.failed.Store(true)
	}
	return n, err
}

// Close implements net.Conn. http.Server calls it where it serves the connection. What the
// client has not taken yet would stay in the kernel for a minute or more, and be counted
// nowhere: so the connection keeps its place until the client has taken all, for
// writeTimeout at most, and is then reset. Meanwhile it can be evicted like an idle one.
func (c *Conn) Close() error {
	c.limiter.mu.Lock()
	wait := c.place != nil && !c.limiter.draining && !c.failed.Load()
	c.limiter.mu.Unlock()
	if wait && unsent(c.Conn) {
		c.limiter.setIdle(c)
		c.awaitClient()
	}
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.limiter.untrackLocked(c)
	if c.failed.Load() || wait && unsent(c.Conn) {
		reset(c.Conn)
		return nil
	}
	return c.Conn.Close()
}

// awaitClient finishes sending, reads what the client was about to send (unread, it would
// turn the end into a reset), and waits until the client has taken all.
func (c *Conn) awaitClient() {
	by := time.Now().Add(writeTimeout)
	if c.CloseWrite() != nil || c.SetReadDeadline(by) != nil {
		return
	}
	var ignored [512]byte
	for left := maxIgnored; left > 0; {
		n, err := c.Conn.Read(ignored[:])
		if left -= n; err != nil {
			break
		}
	}
	// The kernel has no event for that.
	for pause := time.Millisecond; unsent(c.Conn) && time.Now().Before(by); pause *= 2 {
		time.Sleep(min(pause, time.Until(by)))
	}
}

// CloseWrite lets http.Server end a connection such that the client can read what it was
// sent.
func (c *Conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
