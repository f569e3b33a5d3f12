package listener

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Any process of the node can have connections from other loopback addresses, and the same
// ports. They must not hide whose this one is.
func TestSocketUIDWithEqualPorts(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	reuse := func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}
	// What somebody else has bound, without reuse, is no port for this: then another.
	var all []net.Conn
	for try := 0; len(all) < 4; try++ {
		for _, conn := range all {
			_ = conn.Close()
		}
		all = nil
		port := 0
		for _, from := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"} {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from), Port: port}, Control: reuse}
			conn, err := dialer.DialContext(context.Background(), "tcp", ln.Addr().String())
			if errors.Is(err, unix.EADDRINUSE) && try < 20 {
				break
			}
			require.NoError(t, err)
			defer conn.Close()
			port = conn.LocalAddr().(*net.TCPAddr).Port
			all = append(all, conn)
		}
	}
	for _, conn := range all {
		uid, err := socketUID(conn.LocalAddr(), conn.RemoteAddr())
		require.NoError(t, err, "%s", conn.LocalAddr())
		assert.Equal(t, uint32(os.Getuid()), uid) //nolint:gosec // a user ID is not negative
	}
}

// Some programs have sockets of IPv6 only, and use them for IPv4 too (RFC 3493, 3.7).
func TestSocketUIDOfAnIPv6Socket(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		t.Skip("this kernel has no IPv6, and so nobody such a socket")
	}
	require.NoError(t, err)
	defer unix.Close(fd)
	to := &unix.SockaddrInet6{Port: ln.Addr().(*net.TCPAddr).Port, Addr: [16]byte(net.IPv4(127, 0, 0, 1).To16())}
	require.NoError(t, unix.Connect(fd, to))
	ours, err := ln.Accept()
	require.NoError(t, err)
	defer ours.Close()
	uid, err := socketUID(ours.RemoteAddr(), ours.LocalAddr())
	require.NoError(t, err)
	assert.Equal(t, uint32(os.Getuid()), uid) //nolint:gosec // a user ID is not negative
}

func TestSocketUIDOfAClosedSocket(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	ours, err := ln.Accept()
	require.NoError(t, err)
	uid, err := socketUID(ours.RemoteAddr(), ours.LocalAddr())
	require.NoError(t, err)
	assert.Equal(t, uint32(os.Getuid()), uid) // a user ID is not negative

	// Closed by the client first: the kernel now has a time-wait entry, of user 0.
	require.NoError(t, client.Close())
	_, err = io.ReadAll(ours)
	require.NoError(t, err)
	require.NoError(t, ours.Close())
	assert.Eventually(t, func() bool {
		_, err := socketUID(ours.RemoteAddr(), ours.LocalAddr())
		return err != nil
	}, 30*time.Second, time.Millisecond)
	_, err = socketUID(ours.RemoteAddr(), ours.LocalAddr())
	require.Error(t, err)
}

func TestSocketUIDOfNoSocket(t *testing.T) {
	at := func(port int) *net.TCPAddr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port} }
	_, err := socketUID(at(1), at(2))
	assert.Error(t, err)
}
