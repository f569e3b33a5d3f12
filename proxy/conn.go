package proxy

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	// answerTimeout bounds each write of an answer of ours, of which the longest takes
	// three: what has to wait for a client after that is lost. It begins with the write,
	// however long the answer was waited for. It is also how long a closed connection is
	// kept for a client that has not taken all of its answer.
	answerTimeout = 5 * time.Second
	// passThroughTimeout is the same for the whole of an answer of IMDS's.
	passThroughTimeout = 3 * time.Minute
	// maxIgnored is how much is read of a client whose connection ends.
	maxIgnored = 8 << 10
)

// conn is a connection that is counted until the kernel, too, holds nothing of it.
type conn struct {
	net.Conn
	all    *connections
	caller *caller
	// cancel ends the context of the connection's requests. http.Server does that when it
	// notices that the client has gone, and it does not look out for that while there is
	// something unread, such as a body that nobody wants.
	cancel context.CancelFunc

	// Guarded by all.mu.
	place *list.Element // in its source; nil once it is counted out
	busy  bool

	// The request under way. They are written by the goroutine that serves the
	// connection; inBody is read by the one that looks out for the client's end.
	inBody   atomic.Bool // its head has been read
	wanted   atomic.Bool // its body is; see wantBody
	head     headReader
	answerBy time.Time // for the rest of the answer; zero for answerTimeout a write

	failed atomic.Bool // an answer was not taken in time
}

// connKey finds the *conn of a request in its context.
type connKey struct{}

func withConn(ctx context.Context, c net.Conn) context.Context {
	if counted, ok := c.(*conn); ok {
		ctx, counted.cancel = context.WithCancel(ctx)
	}
	return context.WithValue(ctx, connKey{}, c)
}

// connOf is the connection that a request came on; nil in tests without one.
func connOf(r *http.Request) *conn {
	if r == nil {
		return nil
	}
	c, _ := r.Context().Value(connKey{}).(*conn)
	return c
}

// wantBody says that the body of a request will be read. By default nobody does but
// http.Server, looking for its end.
func (c *conn) wantBody() {
	if c != nil {
		c.wanted.Store(true)
	}
}

// startRequest notes that http.Server has parsed a head: what follows is the body.
func (c *conn) startRequest() {
	c.wanted.Store(false)
	c.inBody.Store(true)
}

// endRequest notes that the next thing to read is a head.
func (c *conn) endRequest() {
	c.inBody.Store(false)
	c.head.begin()
	c.answerBy = time.Time{}
}

// Read implements net.Conn. Of a head it returns no more than the rest, so that none is
// parsed before its lines have been counted.
func (c *conn) Read(p []byte) (int, error) {
	if c.inBody.Load() {
		return c.head.readBody(c.Conn, p, c.wanted.Load())
	}
	return c.head.read(c.Conn, p)
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	by := c.answerBy
	if by.IsZero() {
		by = time.Now().Add(answerTimeout)
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
// by nobody: so the connection keeps its place until the client has taken all, for
// answerTimeout at most, and is then reset. As an idle one it gives way to a new one.
func (c *conn) Close() error {
	c.all.mu.Lock()
	wait := c.place != nil && !c.all.draining && !c.failed.Load()
	c.all.mu.Unlock()
	if wait && unsent(c.Conn) {
		c.all.setBusy(c, false)
		c.awaitClient()
	}
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.end()
	c.all.untrackLocked(c)
	if c.failed.Load() || wait && unsent(c.Conn) {
		reset(c.Conn)
		return nil
	}
	return c.Conn.Close()
}

// end ends the connection's requests: nobody waits for their answers any more.
func (c *conn) end() {
	if c.cancel != nil { // else it has not reached http.Server
		c.cancel()
	}
}

// awaitClient finishes sending, reads what the client was about to send (left unread it
// would make of the end a reset), and waits until the client has taken all.
func (c *conn) awaitClient() {
	by := time.Now().Add(answerTimeout)
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
	// Nothing tells when it has.
	for pause := time.Millisecond; unsent(c.Conn) && time.Now().Before(by); pause *= 2 {
		time.Sleep(min(pause, time.Until(by)))
	}
}

// CloseWrite lets http.Server end a connection such that the client can read what it
// was told.
func (c *conn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
