package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// listen opens a TCP listener.
func listen(ctx context.Context, at endpoint) (*net.TCPListener, error) {
	network := "tcp4"
	if at.addr.Addr().Is6() {
		network = "tcp" // :: is all IPv4 addresses, too
	}
	// A connection ends when it has been idle for some time. Probes of the kernel would not end it
	// earlier, and cost four system calls for each connection.
	lc := net.ListenConfig{KeepAlive: -1}
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

// listenUnix listens on a Unix socket for root alone, in the place of what has the name:
// a socket that this pod's last container left.
func listenUnix(ctx context.Context, path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var failure error
		err := c.Control(func(fd uintptr) { failure = unix.Fchmod(int(fd), 0o600) }) // before there is a file
		return errors.Join(err, failure)
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil //nolint:errcheck // it is one, of this network
}
