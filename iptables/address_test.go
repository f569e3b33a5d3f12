package iptables_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

// An address that may be another machine's is not taken, and pods are refused meanwhile; one that the
// node has is used where it is.
func TestAddressOfTheNode(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Routed)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "own"}, PeerName: "other"}
	require.NoError(t, netlink.LinkAdd(link))
	defer netlink.LinkDel(link)
	own, err := netlink.ParseAddr("10.9.9.9/32")
	require.NoError(t, err)
	cfg := n.config(iptables.DNAT)
	cfg.Address = netip.MustParseAddr("10.9.9.9")

	r, err := iptables.New(cfg)
	require.NoError(t, err)
	stop := n.start(r)
	n.eventually(func() bool { return r.Status().Backend != "" }, "reconciled once")
	assert.ErrorContains(t, r.Status().Err, "--redirect-address=10.9.9.9 is no address of this node: give one that the node has")
	assert.False(t, n.has("lo", own), "not taken")
	assert.Empty(t, askFor(n.pod, aMoment))
	assert.Zero(t, n.leaks.Load(), "the fences are there")
	stop()

	require.NoError(t, netlink.AddrAdd(link, own))
	n.reconcile(cfg)
	assert.False(t, n.has("lo", own))
	ln, err := net.Listen("tcp4", "10.9.9.9:2579")
	require.NoError(t, err)
	n.serve(ln, func(string) string { return "agent" })
	assert.Equal(t, "agent", n.ask())
}

func (n *node) has(link string, addr *netlink.Addr) bool {
	n.t.Helper()
	l, err := netlink.LinkByName(link)
	require.NoError(n.t, err)
	all, err := netlink.AddrList(l, netlink.FAMILY_V4)
	require.NoError(n.t, err)
	for _, a := range all {
		if a.IP.Equal(addr.IP) {
			return true
		}
	}
	return false
}
