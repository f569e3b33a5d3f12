package links_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

func TestStolenAddress(t *testing.T) {
	for name, guard := range map[string]func(t *testing.T, victim *testbed.Pod){
		"an open bridge": func(*testing.T, *testbed.Pod) {},
		// Azure CNI's bridge mode answers pods' ARP requests with this rule. It does not
		// match the node's requests, nor unsolicited replies.
		"with ARP answered by ebtables": func(t *testing.T, victim *testbed.Pod) {
			t.Helper()
			rule := fmt.Sprintf("-A PREROUTING -p ARP --arp-op Request --arp-ip-dst %s -j arpreply --arpreply-mac %s --arpreply-target DROP", victim.Addr, hardwareAddr(t, victim))
			out, err := exec.Command("sh", "-c", "ebtables-nft -t nat "+rule).CombinedOutput()
			require.NoError(t, err, string(out))
			t.Cleanup(func() { _ = exec.Command("ebtables-nft", "-t", "nat", "-F").Run() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			tracker := n.track(links.Config{})
			victim, _ := n.addPod("10.244.0.7", testbed.Bridge)
			thief, _ := n.addPod("10.244.0.8", testbed.Bridge)
			bridge := n.call(victim, victim.Addr) // the node knows the address
			require.Equal(t, indexOf(t, testbed.BridgeName), bridge, "the kernel reports the bridge, not its port")
			guard(t, victim)
			steal(t, thief, victim.Addr)
			require.Equal(t, bridge, n.call(thief, victim.Addr), "the node takes the thief for the victim")
			err := tracker.Check(victim.Addr, bridge, started("victim", 0))
			require.ErrorIs(t, err, links.ErrUnguarded)
			require.ErrorContains(t, err, testbed.BridgeName)
		})
	}
}

// What guards is a pinned neighbour, which Azure CNI's bridge mode has too.
func TestPinnedAddresses(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	victim, _ := n.addPod("10.244.0.7", testbed.Bridge)
	thief, _ := n.addPod("10.244.0.8", testbed.Bridge)
	bridge := n.call(victim, victim.Addr)
	pin(t, victim)
	require.NoError(t, tracker.Check(victim.Addr, bridge, started("victim", 0)))
	steal(t, thief, victim.Addr)
	_, err := n.tryCall(thief, victim.Addr, aMoment)
	require.Error(t, err)
	require.NoError(t, tracker.Check(victim.Addr, n.call(victim, victim.Addr), started("victim", 0)))
	require.ErrorIs(t, tracker.Check(thief.Addr, bridge, started("thief", 0)), links.ErrUnguarded, "not pinned")
}

// A pod that takes over the hardware address, too, is behind another port.
func TestStolenHardwareAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		victim, thief time.Duration // since their containers started
		thiefSeen     bool
	}{
		"the thief started later":                  {time.Minute, 0, false},
		"the thief started earlier":                {0, time.Minute, false},
		"the thief started earlier and has called": {0, time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			victim, _ := n.addPod("10.244.0.7", testbed.Bridge)
			thief, _ := n.addPod("10.244.0.8", testbed.Bridge)
			tracker := n.track(links.Config{})
			pin(t, victim)
			pin(t, thief)
			victimPod, thiefPod := started("victim", tc.victim), started("thief", tc.thief)
			bridge := n.call(victim, victim.Addr)
			require.NoError(t, tracker.Check(victim.Addr, bridge, victimPod))
			if tc.thiefSeen {
				require.NoError(t, tracker.Check(thief.Addr, n.call(thief, thief.Addr), thiefPod))
			}

			steal(t, thief, victim.Addr)
			stealHardwareAddr(t, thief, hardwareAddr(t, victim))
			require.Equal(t, bridge, n.call(thief, victim.Addr), "the handshake is the thief's")
			require.ErrorIs(t, tracker.Check(victim.Addr, bridge, victimPod), links.ErrReused)

			// The victim's next packet moves the hardware address back.
			require.NoError(t, thief.Do(func() error {
				eth0, err := netlink.LinkByName(testbed.PodLink)
				if err != nil {
					return err
				}
				return netlink.LinkSetDown(eth0)
			}))
			require.NoError(t, tracker.Check(victim.Addr, n.call(victim, victim.Addr), victimPod), "the victim is served again")
		})
	}
}

// AllowUnguarded does not accept the previous pod.
func TestReusedAddressOnABridge(t *testing.T) {
	for name, seen := range map[string]bool{"the previous pod has called": true, "the previous pod never called": false} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.addPod("10.244.0.9", testbed.Bridge) // so that the bridge stays
			tracker := n.track(links.Config{AllowUnguarded: true})
			pod, remove := n.addPod("10.244.0.7", testbed.Bridge)
			before := started("before", 0)
			if seen {
				require.NoError(t, tracker.Check(pod.Addr, n.call(pod, pod.Addr), before))
			} else {
				before = started("before", time.Minute)
			}
			remove()
			next, _ := n.addPod("10.244.0.7", testbed.Bridge)
			bridge := n.call(next, next.Addr)
			require.ErrorIs(t, tracker.Check(next.Addr, bridge, before), links.ErrReused)
			require.NoError(t, tracker.Check(next.Addr, bridge, started("after", 0)))
			require.ErrorIs(t, tracker.Check(next.Addr, bridge, before), links.ErrReused)
		})
	}
}

// A bridge announces that its port is deleted when it leaves; the interface stays.
func TestPortLeavesBridge(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{AllowUnguarded: true})
	pod, _ := n.addPod("10.244.0.7", testbed.Bridge)
	claimed := started("a", 0)
	require.NoError(t, tracker.Check(pod.Addr, n.call(pod, pod.Addr), claimed))
	link, err := netlink.LinkByName(pod.Link)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetNoMaster(link))
	require.NoError(t, tracker.Check(pod.Addr, link.Attrs().Index, claimed))
}

// The pods' gateway is on an interface above the bridge.
func TestSubnetRoute(t *testing.T) {
	n := newNode(t)
	n.addPod("10.244.0.7", testbed.Bridge)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "above", indexOf(t, testbed.BridgeName)
	above := &netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}
	require.NoError(t, netlink.LinkAdd(above))
	require.NoError(t, netlink.LinkSetUp(above))
	addr, err := netlink.ParseAddr("10.245.0.1/24")
	require.NoError(t, err)
	require.NoError(t, netlink.AddrAdd(above, addr))
	tracker := n.track(links.Config{})
	err = tracker.Check(netip.MustParseAddr("10.245.0.7"), indexOf(t, "above"), started("a", 0))
	require.ErrorIs(t, err, links.ErrUnguarded)
	require.ErrorContains(t, err, "above")
}

func TestUnpinnedAddress(t *testing.T) {
	n := newNode(t)
	pod, _ := n.addPod("10.244.0.7", testbed.Bridge)
	tracker := n.track(links.Config{})
	bridge := n.call(pod, pod.Addr)
	entry := pin(t, pod)
	require.NoError(t, tracker.Check(pod.Addr, bridge, started("a", 0)))
	require.NoError(t, netlink.NeighDel(entry))
	assert.ErrorIs(t, tracker.Check(pod.Addr, bridge, started("a", 0)), links.ErrUnguarded, "at once, in spite of the cache")
}

func TestAllowUnguarded(t *testing.T) {
	n := newNode(t)
	pod, _ := n.addPod("10.244.0.7", testbed.Bridge)
	tracker := n.track(links.Config{AllowUnguarded: true})
	assert.NoError(t, tracker.Check(pod.Addr, n.call(pod, pod.Addr), started("a", 0)))
}
