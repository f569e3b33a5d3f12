package proxy

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/podidentity/nmi/proxy/listener"
)

// front accepts connections for the fast path, and is a listener for http.Server, which accepts
// from it those that need more.
type front struct {
	net.Listener // of *listener.Conn
	fastPath     func(c *listener.Conn, timeout time.Duration) (handOver bool)

	handedOver chan net.Conn
	failures   chan error // of Accept
	closed     chan struct{}
	close      sync.Once
	serving    sync.WaitGroup // of goroutines

	mu      sync.Mutex // guards stopped, and that it stays false while goServe adds a goroutine
	stopped bool       // see stop
}

// newFront returns a front that accepts already.
func newFront(ln net.Listener, fastPath func(*listener.Conn, time.Duration) (handOver bool)) *front {
	f := &front{Listener: ln, fastPath: fastPath, handedOver: make(chan net.Conn), failures: make(chan error), closed: make(chan struct{})}
	f.serving.Go(f.accept)
	return f
}

// accept accepts until the listener is closed.
func (f *front) accept() {
	for {
		accepted, err := f.Listener.Accept()
		if err == nil {
			f.serving.Go(func() { f.serve(accepted.(*listener.Conn), readHeaderTimeout) }) //nolint:errcheck // see above
			continue
		}
		if f.isStopped() {
			return
		}
		select {
		case f.failures <- err: // http.Server waits before it accepts again, if the error is temporary
		case <-f.closed:
			return
		}
	}
}

// stop ends accept and goServe. http.Server still gets the connections that are open.
func (f *front) stop() {
	f.mu.Lock()
	f.stopped = true
	f.mu.Unlock()
	_ = f.Listener.Close()
}

func (f *front) isStopped() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stopped
}

// goServe runs serve in a goroutine of its own, unless front is stopped: nobody would wait for
// that.
func (f *front) goServe(serve func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.serving.Go(serve)
	}
	return !f.stopped
}

// serve lets the fast path serve a connection for as long as it can.
func (f *front) serve(c *listener.Conn, timeout time.Duration) {
	if f.fastPath(c, timeout) {
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
