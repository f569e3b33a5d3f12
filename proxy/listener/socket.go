package listener

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// The sizes of the kernel's buffers for a connection, which count as the agent's memory in
// cgroup v2. The kernel doubles them for its bookkeeping (socket(7), SO_RCVBUF); buffers
// without a fixed size grow to megabytes (tcp(7), tcp_rmem and tcp_wmem). A request has 1 KiB
// and a response 2 to 4: neither fills its buffer.
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

// unsent reports whether the client has not received all that was written to its connection:
// whether bytes are not sent yet, or not acknowledged (tcp(7), SIOCOUTQ).
func unsent(c net.Conn) bool {
	bytes := 0
	err := control(c, func(fd int) (err error) {
		bytes, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		return err
	})
	return err == nil && bytes > 0
}

// reset closes a connection with a RST, so that the kernel keeps nothing of it.
func reset(c net.Conn) {
	if tcp, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// control calls fn with the file descriptor of a connection or listener, if it has one.
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
