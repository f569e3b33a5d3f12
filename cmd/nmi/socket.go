package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// listen opens a TCP listener.
func listen(ctx context.Context, at endpoint) (*net.TCPListener, error) {
	network := "tcp4"
	if at.addr.Addr().Is6() {
		network = "tcp" // :: is all IPv4 addresses, too
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // Go's default; each subflow of a connection would have buffers of its own
	ln, err := lc.Listen(ctx, network, at.addr.String())
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("port %d is taken: another program, or an agent that does not hand over runs there "+
			"(an older NMI, or one with another --handover-dir): stop it first, or choose another --%s", at.addr.Port(), at.flag)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s is not an address of this node: choose one that is, or 0.0.0.0 for all", at.addr.Addr())
	case err != nil:
		return nil, fmt.Errorf("listening for --%s: %w", at.flag, err)
	}
	return ln.(*net.TCPListener), nil //nolint:errcheck // it is one, of these networks
}

// listenUnix opens a Unix socket for root alone, in the place of whatever has the
// name: what an agent before left there, and nobody listens on.
func listenUnix(ctx context.Context, network, path string) (*net.UnixListener, error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failure error
		err := c.Control(func(fd uintptr) { failure = unix.Fchmod(int(fd), 0o600) }) // before there is a file
		return errors.Join(err, failure)
	}}
	ln, err := lc.Listen(ctx, network, fresh)
	if err != nil {
		return nil, err
	}
	socket := ln.(*net.UnixListener) //nolint:errcheck // it is one, of these networks
	socket.SetUnlinkOnClose(false)   // by then the name may be another's
	if err := os.Rename(fresh, path); err != nil {
		_ = socket.Close()
		return nil, err
	}
	return socket, nil
}

// past is a deadline that is over.
var past = time.Unix(1, 0)

// gate is a listener that can be shut for a while: what comes meanwhile is for
// whoever else has the same socket. An Accept under way may let one more in.
type gate struct {
	*net.TCPListener
	mu      sync.Mutex    // guards waiting
	waiting chan struct{} // nil while the gate is open
}

// Accept waits while the gate is shut.
func (g *gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.TCPListener.Accept()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return conn, err
		}
		g.mu.Lock()
		waiting := g.waiting
		g.mu.Unlock()
		if waiting != nil {
			<-waiting
		}
	}
}

// Close ends Accept, whether the gate is open or shut.
func (g *gate) Close() error {
	err := g.TCPListener.Close()
	g.open()
	return err
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = make(chan struct{})
	_ = g.SetDeadline(past)
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting != nil {
		_ = g.SetDeadline(time.Time{})
		close(g.waiting)
		g.waiting = nil
	}
}
