package listener

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// OnlyTo has the kernel drop what comes to a TCP listener for other IPv4 addresses than these: no
// connection is made there, and the listener's process never hears of it. Without addresses all are
// allowed again. It holds for all processes that have the listener, and for the connections that it
// accepts. A listener cannot be bound to several addresses, and one that is bound to an address of
// the redirect could not be opened before that is on the node.
func OnlyTo(ln *net.TCPListener, addrs ...netip.Addr) error {
	return control(ln, func(fd int) error {
		if len(addrs) == 0 {
			// ENOENT: there is no filter (sk_detach_filter).
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("opening the listener to all addresses: %w", err)
			}
			return nil
		}
		filter := destinationFilter(addrs)
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]} //nolint:gosec // there are few
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
			return fmt.Errorf("closing the listener to other addresses: %w", err)
		}
		return nil
	})
}

// destinationFilter accepts packets to the addresses, and drops all others.
func destinationFilter(addrs []netip.Addr) []unix.SockFilter {
	const (
		networkHeader = 0xfff00000 // SKF_NET_OFF of linux/filter.h: offsets from there
		destination   = 16         // in the IPv4 header (RFC 791, section 3.1)
		all           = 0xffffffff // bytes to keep of a packet that is accepted
	)
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: networkHeader + destination}}
	for _, addr := range addrs {
		ip := addr.As4()
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: binary.BigEndian.Uint32(ip[:])},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: all})
	}
	return append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
}
