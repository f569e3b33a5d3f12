package listener

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// The kernel's buffers of a pod's connection, which count against the agent's memory in
// version 2 of cgroups. The kernel takes twice as much for its own bookkeeping (socket(7),
// SO_RCVBUF), and without a fixed size megabytes (tcp(7), tcp_rmem and tcp_wmem). A request
// is one of 1 KiB, an answer one of 2 to 4: neither waits for its buffer.
const (
	receiveBuffer = 8 << 10
	sendBuffer    = 8 << 10
)

// FixBuffers fixes the sizes of the kernel's buffers for the connections that a TCP listener
// accepts from now on (a new socket has its listener's), and so for what clients are told to
// send at first.
func FixBuffers(ln net.Listener) error {
	return control(ln, func(fd int) error {
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer),
		)
	})
}

// unsent reports whether a client has not taken all that was written to its connection:
// whether bytes are unacknowledged, or not sent for want of room on its side (tcp(7),
// SIOCOUTQ).
func unsent(c net.Conn) bool {
	bytes := 0
	err := control(c, func(fd int) (err error) {
		bytes, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		return err
	})
	return err == nil && bytes > 0
}

// reset closes a connection with a reset, so that nothing of it stays in the kernel.
func reset(c net.Conn) {
	if tcp, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close() // nobody can be told
}

// control calls fn with the file descriptor of a connection or listener; not at all where
// there is none, as in tests.
func control(socket any, fn func(fd int) error) error {
	with, ok := socket.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := with.SyscallConn()
	if err != nil {
		return fmt.Errorf("the socket's descriptor: %w", err)
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = fn(int(fd)) })
	return errors.Join(err, failure)
}

// addrOf is the IP address of one end of a connection; the zero one if it is not TCP.
func addrOf(addr net.Addr) netip.Addr {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
