package handover

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a TCP listener that another process may have too. While it is paused it
// leaves new connections to that process; an Accept under way may take one more.
type Listener struct {
	*net.TCPListener
	mu     sync.Mutex    // guards paused
	paused chan struct{} // closed by resume; nil while the listener accepts
}

// Accept waits while the listener is paused.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.TCPListener.Accept()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return conn, err
		}
		l.mu.Lock()
		paused := l.paused
		l.mu.Unlock()
		if paused != nil {
			<-paused
		}
	}
}

// Close ends Accept, paused or not.
func (l *Listener) Close() error {
	err := l.TCPListener.Close()
	l.resume()
	return err
}

func (l *Listener) pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused == nil {
		l.paused = make(chan struct{})
		_ = l.SetDeadline(aLongTimeAgo)
	}
}

func (l *Listener) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused != nil {
		_ = l.SetDeadline(time.Time{})
		close(l.paused)
		l.paused = nil
	}
}

// listenUnix listens on a Unix socket for root alone, in the place of whatever has the
// name: what an agent left there on which nobody listens any more.
func listenUnix(ctx context.Context, path string) (*net.UnixListener, error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failure error
		err := c.Control(func(fd uintptr) { failure = unix.Fchmod(int(fd), 0o600) }) // before there is a file
		return errors.Join(err, failure)
	}}
	ln, err := lc.Listen(ctx, "unixpacket", fresh)
	if err != nil {
		return nil, err
	}
	socket := ln.(*net.UnixListener) //nolint:errcheck // it is one, of this network
	socket.SetUnlinkOnClose(false)   // by then the name may be another agent's
	if err := os.Rename(fresh, path); err != nil {
		_ = socket.Close()
		return nil, err
	}
	return socket, nil
}
