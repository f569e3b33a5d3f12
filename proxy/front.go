package proxy

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"github.com/podidentity/nmi/proxy/listener"
)

// front accepts connections for the fast path, and is a listener for http.Server, which accepts
// from it those that need more.
type front struct {
	net.Listener // of *listener.Conn
	fastPath     func(*listener.Conn) (handOver bool)

	handedOver chan net.Conn
	failures   chan error  // of Accept
	stopped    atomic.Bool // see stop
	closed     chan struct{}
	close      sync.Once
	serving    sync.WaitGroup // of goroutines
}

// newFront returns a front that accepts already.
func newFront(ln net.Listener, fastPath func(*listener.Conn) (handOver bool)) *front {
	f := &front{Listener: ln, fastPath: fastPath, handedOver: make(chan net.Conn), failures: make(chan error), closed: make(chan struct{})}
	f.serving.Go(f.accept)
	return f
}

// accept accepts until the listener is closed.
func (f *front) accept() {
	for {
		accepted, err := f.Listener.Accept()
		if err == nil {
			f.serving.Go(func() { f.serve(accepted.(*listener.Conn)) }) //nolint:errcheck // see above
			continue
		}
		if f.stopped.Load() {
			return
		}
		select {
		case f.failures <- err: // http.Server waits before it accepts again, if the error is temporary
		case <-f.closed:
			return
		}
	}
}

// stop ends accept. http.Server still gets the connections that are open.
func (f *front) stop() {
	f.stopped.Store(true)
	_ = f.Listener.Close()
}

// serve lets the fast path serve a connection for as long as it can.
func (f *front) serve(c *listener.Conn) {
	if f.fastPath(c) {
		f.handOver(c)
	}
}

func (f *front) handOver(c *listener.Conn) {
	c.HandOver()
	select {
	case f.handedOver <- c:
	case <-f.closed:
		_ = c.Close()
	}
}

// Accept implements net.Listener, for http.Server.
func (f *front) Accept() (net.Conn, error) {
	select {
	case c := <-f.handedOver:
		return c, nil
	case err := <-f.failures:
		return nil, err
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (f *front) Close() error {
	f.close.Do(func() { close(f.closed) })
	if err := f.Listener.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
