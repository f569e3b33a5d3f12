package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of linux/inet_diag.h.
const (
	diagRequestLen = 56 // struct inet_diag_req_v2
	diagMessageLen = 72 // struct inet_diag_msg
	diagCgroupID   = 21 // INET_DIAG_CGROUP_ID
)

// ownCgroup returns the ID of the cgroup that this process's sockets get. In a container
// /proc/self/cgroup does not tell it, so the kernel is asked for that of a new socket
// (sock_diag(7)).
func ownCgroup() (cgroupID, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	addr := ln.Addr().(*net.TCPAddr).AddrPort() //nolint:errcheck // it is one

	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	b := make([]byte, diagRequestLen)
	b[0], b[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[8:], addr.Port())
	copy(b[12:], addr.Addr().AsSlice())
	for i := range 8 { // no cookie: INET_DIAG_NOCOOKIE, twice
		b[48+i] = 0xff
	}
	req.AddRawData(b)
	answers, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	if errors.Is(err, unix.ENOENT) { // inet_diag_lock_handler, after request_module
		return 0, errors.New("the kernel module tcp_diag is not loaded, and the kernel could not load it: run modprobe tcp_diag on the node")
	}
	if err != nil {
		return 0, err
	}
	if len(answers) != 1 || len(answers[0]) < diagMessageLen {
		return 0, errors.New("the kernel did not answer with one socket")
	}
	attrs, err := nl.ParseRouteAttr(answers[0][diagMessageLen:])
	if err != nil {
		return 0, err
	}
	for _, a := range attrs {
		if a.Attr.Type == diagCgroupID && len(a.Value) == 8 {
			return cgroupID(binary.NativeEndian.Uint64(a.Value)), nil
		}
	}
	return 0, errors.New("the kernel does not tell the cgroup of a socket: it needs Linux 5.15 with CONFIG_CGROUP_BPF")
}

// netnsCookie returns the cookie of this process's network namespace, which is the node's.
func netnsCookie() (cookie uint64, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		return 0, fmt.Errorf("the cookie of the network namespace (Linux 5.14 and later have it): %w", err)
	}
	return cookie, nil
}

// descriptor calls fn with the file descriptor of a socket.
func descriptor(socket syscall.Conn, fn func(fd int) error) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(fd uintptr) { failure = fn(int(fd)) })
	return errors.Join(err, failure)
}
