package links_test

import (
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

func TestMain(m *testing.M) { testbed.Main(m.Run) }

const (
	// patience is the timeout for what must happen, also on a busy machine.
	patience = 30 * time.Second
	// aMoment is how long to wait for what must not happen.
	aMoment = 700 * time.Millisecond
	// tick is how often a condition is checked.
	tick = 5 * time.Millisecond
)

// node is a node with a server that pods call.
type node struct {
	testing.TB
	network  *testbed.Network
	listener *net.TCPListener
}

func newNode(tb testing.TB) *node {
	tb.Helper()
	n := &node{TB: tb}
	var err error
	n.network, err = testbed.NewNetwork()
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, n.network.Close()) })
	ln, err := net.Listen("tcp4", testbed.NodeAddress+":0")
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = ln.Close() })
	n.listener = ln.(*net.TCPListener)
	return n
}

// addPod adds a pod until the test ends or the returned function is called.
func (n *node) addPod(addr string, shape testbed.Shape) (pod *testbed.Pod, remove func()) {
	n.Helper()
	pod, err := n.network.AddPod(addr, shape)
	require.NoError(n, err)
	remove = sync.OnceFunc(func() { assert.NoError(n, pod.Close()) })
	n.Cleanup(remove)
	return pod, remove
}

// track runs a tracker until the test ends.
func (n *node) track(cfg links.Config) *links.Tracker {
	n.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	tracker, err := links.New(cfg)
	require.NoError(n, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { tracker.Run(ctx) })
	n.Cleanup(func() { cancel(); running.Wait() })
	return tracker
}

// call connects a pod to the server, from one of its addresses, and returns the index of
// the interface that the connection came in over.
func (n *node) call(pod *testbed.Pod, from netip.Addr) int {
	n.Helper()
	index, err := n.tryCall(pod, from, patience)
	require.NoError(n, err)
	return index
}

func (n *node) tryCall(pod *testbed.Pod, from netip.Addr, patience time.Duration) (index int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var conn net.Conn
	err = pod.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err = dialer.DialContext(ctx, "tcp4", n.listener.Addr().String())
		return err
	})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	accepted, err := n.listener.AcceptTCP()
	require.NoError(n, err)
	defer accepted.Close()
	require.Equal(n, from, accepted.RemoteAddr().(*net.TCPAddr).AddrPort().Addr())
	return ingress(n, accepted), nil
}

// ingress asks the kernel for the interface of a connection, as proxy does.
func ingress(tb testing.TB, conn *net.TCPConn) (index int) {
	tb.Helper()
	raw, err := conn.SyscallConn()
	require.NoError(tb, err)
	require.NoError(tb, raw.Control(func(fd uintptr) {
		require.NoError(tb, unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1))
		b := make([]byte, 128)
		size := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_IP, unix.IP_PKTOPTIONS, uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
		require.Zero(tb, errno)
		messages, err := unix.ParseSocketControlMessage(b[:size])
		require.NoError(tb, err)
		require.Len(tb, messages, 1)
		index = int(binary.NativeEndian.Uint32(messages[0].Data))
	}))
	return index
}

func indexOf(tb testing.TB, name string) int {
	tb.Helper()
	link, err := netlink.LinkByName(name)
	require.NoError(tb, err)
	return link.Attrs().Index
}

// started returns a pod whose containers started some time ago.
func started(uid string, ago time.Duration) links.Pod {
	return links.Pod{UID: uid, Started: time.Now().Add(-ago).Truncate(time.Second)}
}

// steal gives a pod another's address, and announces it.
func steal(tb testing.TB, thief *testbed.Pod, addr netip.Addr) {
	tb.Helper()
	require.NoError(tb, thief.Do(func() error {
		eth0, err := netlink.LinkByName(testbed.PodLink)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr.String() + "/32")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(eth0, a); err != nil {
			return err
		}
		return announce(eth0, addr)
	}))
}

func stealHardwareAddr(tb testing.TB, thief *testbed.Pod, addr net.HardwareAddr) {
	tb.Helper()
	require.NoError(tb, thief.Do(func() error {
		eth0, err := netlink.LinkByName(testbed.PodLink)
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(eth0, addr)
	}))
}

// announce sends a gratuitous ARP reply (RFC 826, RFC 5227).
func announce(link netlink.Link, addr netip.Addr) error {
	arp := unix.ETH_P_ARP>>8 | unix.ETH_P_ARP&0xff<<8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, arp)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	own := link.Attrs().HardwareAddr
	packet := []byte{0, 1, 8, 0, 6, 4, 0, 2} // Ethernet, IPv4, a reply
	for range 2 {                            // sender and target
		packet = append(append(packet, own...), addr.AsSlice()...)
	}
	to := &unix.SockaddrLinklayer{Protocol: uint16(arp), Ifindex: link.Attrs().Index, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}}
	return unix.Sendto(fd, packet, 0, to)
}

func hardwareAddr(tb testing.TB, pod *testbed.Pod) (addr net.HardwareAddr) {
	tb.Helper()
	require.NoError(tb, pod.Do(func() error {
		link, err := netlink.LinkByName(testbed.PodLink)
		if err == nil {
			addr = link.Attrs().HardwareAddr
		}
		return err
	}))
	return addr
}

// pin gives a pod's address a permanent neighbour entry, as Azure CNI's bridge mode does.
func pin(tb testing.TB, pod *testbed.Pod) *netlink.Neigh {
	tb.Helper()
	entry := &netlink.Neigh{
		LinkIndex: indexOf(tb, testbed.BridgeName), IP: pod.Addr.AsSlice(), HardwareAddr: hardwareAddr(tb, pod), State: netlink.NUD_PERMANENT,
	}
	require.NoError(tb, netlink.NeighSet(entry))
	return entry
}
