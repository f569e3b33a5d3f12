package listener

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// OnlyRedirected wraps a TCP listener so that Accept returns only connections that were
// dialed to another address and redirected here by the kernel, and the node's own, see
// Conn.Loopback. Any other, such as one that was dialed to the node's address and the
// listener's port, is reset before a byte is read.
func OnlyRedirected(ln net.Listener, dialed netip.AddrPort) net.Listener {
	return &redirectedListener{Listener: ln, dialed: dialed}
}

type redirectedListener struct {
	net.Listener
	dialed netip.AddrPort
}

func (l *redirectedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if isLoopback(conn) {
			return conn, nil
		}
		if to, err := originalDestination(conn); err == nil && to == l.dialed {
			return conn, nil
		}
		reset(conn)
	}
}

// SyscallConn implements syscall.Conn, for FixBuffers.
func (l *redirectedListener) SyscallConn() (syscall.RawConn, error) {
	socket, ok := l.Listener.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return socket.SyscallConn()
}

// originalDestination asks the kernel where a connection went before NAT
// (SO_ORIGINAL_DST, nf_conntrack_proto.c getorigdst).
func originalDestination(conn net.Conn) (netip.AddrPort, error) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return netip.AddrPort{}, errors.New("not a TCP connection")
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var to netip.AddrPort
	var failure error
	err = raw.Control(func(fd uintptr) {
		// The answer is a sockaddr_in: family, port, address. x/sys has no call
		// for it; this one reads as many bytes as are needed.
		answer, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST)
		if err != nil {
			failure = err
			return
		}
		sockaddr := answer.Multiaddr
		to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(sockaddr[4:8])), binary.BigEndian.Uint16(sockaddr[2:4]))
	})
	return to, errors.Join(err, failure)
}
