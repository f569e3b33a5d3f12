package listener

import (
	"errors"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ingressOf returns the index of the interface that the last packet of a TCP
// connection's handshake came in over (inet_sock.mc_index, set by tcp_v4_syn_recv_sock
// and told by ip(7)'s IP_PKTOPTIONS). It is a bridge and not its port. Unlike the source
// address, the other end cannot choose it.
func ingressOf(c net.Conn) (index int, err error) {
	tcp, ok := c.(syscall.Conn)
	if !ok {
		return 0, errors.New("not a TCP connection")
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0, err
	}
	var answer struct {
		unix.Cmsghdr
		unix.Inet4Pktinfo
		_ [64]byte // room for more than was asked for
	}
	size := uint32(unsafe.Sizeof(answer))
	ctlErr := raw.Control(func(fd uintptr) {
		// This makes the index one of the messages that the next call returns. The kernel
		// has kept it all the time.
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1); err != nil {
			return
		}
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_IP, unix.IP_PKTOPTIONS,
			uintptr(unsafe.Pointer(&answer)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			err = errno
		}
	})
	switch {
	case ctlErr != nil || err != nil:
		return 0, errors.Join(ctlErr, err)
	case answer.Level != unix.IPPROTO_IP || answer.Type != unix.IP_PKTINFO:
		return 0, errors.New("the kernel does not say which interface the connection came in over")
	}
	return int(answer.Ifindex), nil
}
