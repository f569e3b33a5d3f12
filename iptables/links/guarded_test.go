package links_test

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

// Whoever the caller is, what is sent to it over an open bridge may reach its neighbours.
func TestGuarded(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	bridged, _ := n.addPod("10.244.0.7", testbed.Bridge)
	routed, _ := n.addPod("10.244.0.8", testbed.Routed)
	bridge, veth := n.call(bridged, bridged.Addr), n.call(routed, routed.Addr)
	for range 2 { // found, and from memory
		require.ErrorIs(t, tracker.Guarded(bridge, []netip.Addr{bridged.Addr}), links.ErrUnguarded)
		require.NoError(t, tracker.Guarded(veth, []netip.Addr{routed.Addr}))
	}
	err := tracker.Guarded(bridge, nil)
	require.ErrorContains(t, err, "not known yet")
	require.NotErrorIs(t, err, links.ErrUnguarded)
	require.NoError(t, tracker.Guarded(veth, nil))
	require.NoError(t, tracker.Guarded(indexOf(t, "lo"), []netip.Addr{netip.MustParseAddr(testbed.NodeAddress)}), "on the host network")
	assert.NoError(t, n.track(links.Config{AllowUnguarded: true}).Guarded(bridge, nil))
}
