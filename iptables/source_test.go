package iptables_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestWhereAPodCanTakeAnothersAddressNoSourceIsTrusted(t *testing.T) {
	for name, tc := range map[string]struct {
		guard  func(n *node)
		stolen bool
	}{
		"an open bridge": {func(*node) {}, true},
		// Azure CNI's bridge mode answers pods' questions for an address with this
		// rule. The node's own do not pass it, nor does what nobody asked for.
		"with ARP answered by ebtables": {func(n *node) {
			rule := fmt.Sprintf("-A PREROUTING -p ARP --arp-op Request --arp-ip-dst %s -j arpreply --arpreply-mac %s --arpreply-target DROP", n.pod.Addr, hardwareAddr(n.t, n.pod))
			out, err := exec.Command("sh", "-c", "ebtables-nft -t nat "+rule).CombinedOutput()
			require.NoError(n.t, err, string(out))
			n.t.Cleanup(func() { _ = exec.Command("ebtables-nft", "-t", "nat", "-F").Run() })
		}, true},
		// It is this, which Azure CNI does too, that guards.
		"with a neighbour that is pinned": {func(n *node) {
			bridge, err := netlink.LinkByName(testbed.BridgeName)
			require.NoError(n.t, err)
			require.NoError(n.t, netlink.NeighSet(&netlink.Neigh{
				LinkIndex: bridge.Attrs().Index, IP: n.pod.Addr.AsSlice(), HardwareAddr: hardwareAddr(n.t, n.pod), State: netlink.NUD_PERMANENT,
			}))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, iptables.NFT, testbed.Bridge)
			thief, err := n.network.AddPod("10.244.0.8", testbed.Bridge)
			require.NoError(t, err)
			defer func() { assert.NoError(t, thief.Close()) }()
			r, err := iptables.New(n.config(iptables.Redirect))
			require.NoError(t, err)
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			require.Equal(t, "agent", n.ask(), "the node knows the address")

			tc.guard(n)
			steal(t, thief, n.pod.Addr)
			if tc.stolen {
				conn, err := dialFrom(thief, n.pod.Addr, patience)
				require.NoError(t, err, "the thief is taken for the other pod")
				require.NoError(t, conn.Close())
				require.ErrorIs(t, r.CheckSource(n.pod.Addr), iptables.ErrUnguarded)
				assert.ErrorContains(t, r.CheckSource(n.pod.Addr), "cbr0")
				return
			}
			_, err = dialFrom(thief, n.pod.Addr, aMoment)
			require.Error(t, err)
			assert.NoError(t, r.CheckSource(n.pod.Addr))
			assert.ErrorIs(t, r.CheckSource(thief.Addr), iptables.ErrUnguarded, "each address for itself")

			// The limit of this guard, which Status.Notes tells of.
			stealHardwareAddr(t, thief, hardwareAddr(t, n.pod))
			conn, err := dialFrom(thief, n.pod.Addr, patience)
			require.NoError(t, err)
			require.NoError(t, conn.Close())
		})
	}
}

func TestWithALinkOfItsOwnAPodCannotTakeAnothersAddress(t *testing.T) {
	for _, shape := range []testbed.Shape{testbed.Ptp, testbed.Routed} {
		t.Run(string(shape), func(t *testing.T) {
			n := newNode(t, iptables.NFT, shape)
			thief, err := n.network.AddPod("10.244.0.8", shape)
			require.NoError(t, err)
			defer func() { assert.NoError(t, thief.Close()) }()
			r, err := iptables.New(n.config(iptables.DNAT))
			require.NoError(t, err)
			n.redirect(iptables.DNAT)
			n.agent(iptables.DNAT)
			steal(t, thief, n.pod.Addr)
			_, err = dialFrom(thief, n.pod.Addr, aMoment)
			require.Error(t, err, "although rp_filter is off")
			assert.NoError(t, r.CheckSource(n.pod.Addr))
			assert.Equal(t, "agent", n.ask())
		})
	}
}

func TestTheStatusNamesWhatIsWrongWithTheLinks(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Bridge)
	ptp, err := n.network.AddPod("10.244.1.8", testbed.Ptp)
	require.NoError(t, err)
	defer func() { assert.NoError(t, ptp.Close()) }()
	pods := &podList{}
	cfg := n.config(iptables.DNAT)
	cfg.Pods = pods.get
	r, _ := n.reconcile(cfg)
	require.NoError(t, r.Status().Unguarded, "no pods, no trouble")

	pods.set(n.pod.Addr, ptp.Addr)
	n.eventually(func() bool { return r.Status().Unguarded != nil }, "noticed")
	assert.ErrorIs(t, r.Status().Unguarded, iptables.ErrUnguarded)
	assert.ErrorContains(t, r.Status().Unguarded, "cbr0: nothing there stops ARP spoofing (CVE-2021-1677)")
	assert.ErrorContains(t, r.Status().Unguarded, "--allow-network-plugin-kubenet")
	assert.Equal(t, []string{"the kernel does not check source addresses (rp_filter is not 1), though it answers to their owners alone, on: cbr0, " + ptp.Link}, r.Status().Notes)

	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/conf/"+ptp.Link+"/rp_filter", []byte("1"), 0o644))
	pods.set(ptp.Addr)
	n.eventually(func() bool { return r.Status().Unguarded == nil && len(r.Status().Notes) == 0 }, "all is well")

	cfg.AllowUnguarded = true
	pods.set(n.pod.Addr)
	allowed, _ := n.reconcile(cfg)
	assert.NoError(t, allowed.Status().Unguarded)
	assert.NoError(t, allowed.CheckSource(n.pod.Addr))
}

// A bridge by another name: the pods' gateway is on an interface above it.
func TestASharedLinkIsKnownByItsRoute(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Bridge)
	bridge, err := netlink.LinkByName(testbed.BridgeName)
	require.NoError(t, err)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "above", bridge.Attrs().Index
	above := &netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}
	require.NoError(t, netlink.LinkAdd(above))
	require.NoError(t, netlink.LinkSetUp(above))
	addr, err := netlink.ParseAddr("10.245.0.1/24")
	require.NoError(t, err)
	require.NoError(t, netlink.AddrAdd(above, addr))
	r, err := iptables.New(n.config(iptables.Redirect))
	require.NoError(t, err)
	pod := netip.MustParseAddr("10.245.0.7")
	require.ErrorIs(t, r.CheckSource(pod), iptables.ErrUnguarded)
	require.ErrorContains(t, r.CheckSource(pod), "above")
}

func TestTrustInAnAddressEnds(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Bridge)
	require.Equal(t, "imds", n.ask()) // the node knows the address
	bridge, err := netlink.LinkByName(testbed.BridgeName)
	require.NoError(t, err)
	pin := &netlink.Neigh{LinkIndex: bridge.Attrs().Index, IP: n.pod.Addr.AsSlice(), HardwareAddr: hardwareAddr(t, n.pod), State: netlink.NUD_PERMANENT}
	require.NoError(t, netlink.NeighSet(pin))
	r, err := iptables.New(n.config(iptables.Redirect))
	require.NoError(t, err)
	require.NoError(t, r.CheckSource(n.pod.Addr))
	require.NoError(t, netlink.NeighDel(pin))
	n.eventually(func() bool { return r.CheckSource(n.pod.Addr) != nil }, "noticed by itself")
}

func BenchmarkCheckSource(b *testing.B) {
	n := newNode(b, iptables.NFT, testbed.Ptp)
	r, err := iptables.New(n.config(iptables.Redirect))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if err := r.CheckSource(n.pod.Addr); err != nil {
			b.Fatal(err)
		}
	}
}

// steal gives a pod another's address, and tells the world.
func steal(t *testing.T, thief *testbed.Pod, addr netip.Addr) {
	t.Helper()
	require.NoError(t, thief.Do(func() error {
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

func stealHardwareAddr(t *testing.T, thief *testbed.Pod, addr net.HardwareAddr) {
	t.Helper()
	require.NoError(t, thief.Do(func() error {
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

// aMoment is for what must not happen.
const aMoment = 700 * time.Millisecond

// dialFrom connects to the metadata service from an address of the pod's.
func dialFrom(pod *testbed.Pod, addr netip.Addr, patience time.Duration) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = pod.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))}
		conn, err = dialer.DialContext(ctx, "tcp4", testbed.MetadataAddress)
		return err
	})
	return conn, err
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
