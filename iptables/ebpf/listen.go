package ebpf

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Listen prepares the agent's listener: it takes TCP fast open off, which a node can switch on
// for all listeners (ip-sysctl, tcp_fastopen 0x400). With it accept returns connections before
// the client's end is established, and so before their caller is known.
func Listen(ln *net.TCPListener) error {
	return descriptor(ln, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0); err != nil {
			return fmt.Errorf("switching TCP fast open off: %w", err)
		}
		return nil
	})
}
