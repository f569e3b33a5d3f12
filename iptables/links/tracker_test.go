package links_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

var shapes = []testbed.Shape{testbed.Ptp, testbed.Routed}

// The network plugin has given the address to another pod, and the API server still names
// the previous one: until a status is written, or as long as an outage lasts.
func TestReusedAddress(t *testing.T) {
	for _, shape := range shapes {
		t.Run(string(shape), func(t *testing.T) {
			for name, seen := range map[string]bool{"the previous pod has called": true, "the previous pod never called": false} {
				t.Run(name, func(t *testing.T) {
					n := newNode(t)
					tracker := n.track(links.Config{})
					pod, remove := n.addPod("10.244.0.7", shape)
					before := started("before", 0)
					if seen {
						require.NoError(t, tracker.Check(pod.Addr, n.call(pod, pod.Addr), before))
					} else {
						before = started("before", time.Minute)
					}
					remove()

					next, _ := n.addPod("10.244.0.7", shape)
					require.ErrorIs(t, tracker.Expect(next.Addr, before), links.ErrReused)
					require.NoError(t, tracker.Expect(next.Addr, started("after", 0)))
					index := n.call(next, next.Addr)
					for range 1000 { // without news, every time
						require.ErrorIs(t, tracker.Check(next.Addr, index, before), links.ErrReused)
					}
					assert.Equal(t, uint64(1000), tracker.Stats().Refused)
					after := started("after", 0)
					require.NoError(t, tracker.Check(next.Addr, index, after), "the API server names the new pod")
					require.NoError(t, tracker.Check(next.Addr, index, after))
					require.ErrorIs(t, tracker.Check(next.Addr, index, before), links.ErrReused, "and never the previous one again")
					require.ErrorIs(t, tracker.Expect(next.Addr, before), links.ErrReused)
					require.NoError(t, tracker.Expect(next.Addr, after))
				})
			}
		})
	}
}

// The route is removed and added, and the link stays.
func TestRouteFlaps(t *testing.T) {
	for _, shape := range shapes {
		t.Run(string(shape), func(t *testing.T) {
			n := newNode(t)
			tracker := n.track(links.Config{})
			pod, _ := n.addPod("10.244.0.7", shape)
			claimed := started("a", 0)
			kept := n.call(pod, pod.Addr)
			link, err := netlink.LinkByName(pod.Link)
			require.NoError(t, err)
			route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: netlink.NewIPNet(pod.Addr.AsSlice()), Scope: netlink.SCOPE_LINK}
			refused := 0
			check := func(index int) {
				if err := tracker.Check(pod.Addr, index, claimed); err != nil {
					refused++
					t.Log(err)
				}
			}
			for range 100 {
				require.NoError(t, netlink.RouteDel(route))
				check(kept)
				require.NoError(t, netlink.RouteAdd(route))
				check(kept)
				check(n.call(pod, pod.Addr))
			}
			assert.Zero(t, refused, "of 300 requests")
		})
	}
}

func TestDeletedLink(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	pod, remove := n.addPod("10.244.0.7", testbed.Ptp)
	kept := n.call(pod, pod.Addr)
	claimed := started("a", 0)
	require.NoError(t, tracker.Check(pod.Addr, kept, claimed))
	remove()
	require.Eventually(t, func() bool { return tracker.Check(pod.Addr, kept, claimed) != nil }, patience, time.Millisecond)
	require.ErrorIs(t, tracker.Check(pod.Addr, kept, claimed), links.ErrReused)
	require.ErrorIs(t, tracker.Check(pod.Addr, 0, claimed), links.ErrReused, "unknown interface")
	require.Error(t, tracker.Check(pod.Addr, kept, links.Pod{}))
}

// A restarted container does not void a claim, nor does a new sandbox with a new link, once
// its containers have started.
func TestRestartedContainers(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	pod, remove := n.addPod("10.244.0.7", testbed.Ptp)
	index := n.call(pod, pod.Addr)
	claimed := started("a", 0)
	require.NoError(t, tracker.Check(pod.Addr, index, claimed))
	restarted := links.Pod{UID: claimed.UID, Started: claimed.Started.Add(5 * time.Second)}
	require.NoError(t, tracker.Check(pod.Addr, index, restarted))
	require.NoError(t, tracker.Check(pod.Addr, index, claimed), "from an older status")
	remove()

	pod, _ = n.addPod("10.244.0.7", testbed.Ptp)
	index = n.call(pod, pod.Addr)
	require.ErrorIs(t, tracker.Check(pod.Addr, index, restarted), links.ErrReused)
	require.NoError(t, tracker.Check(pod.Addr, index, links.Pod{UID: claimed.UID, Started: restarted.Started.Add(time.Second)}))
}

func TestReusedNameAndIndex(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	defer func() { assert.NoError(t, inside.Close()) }()
	const index = 7000
	link := func(index int) netlink.Link {
		made, err := testbed.AddLink("lxc1", index, inside)
		require.NoError(t, err)
		t.Cleanup(func() { _ = netlink.LinkDel(made) })
		return made
	}
	addr := netip.MustParseAddr("10.244.0.7")
	first := link(index)
	require.Equal(t, index, first.Attrs().Index)
	old := started("old", 0)
	require.NoError(t, tracker.Check(addr, index, old))
	require.NoError(t, netlink.LinkDel(first))
	link(index)
	require.ErrorIs(t, tracker.Check(addr, index, old), links.ErrReused, "same name and index")
	require.ErrorIs(t, tracker.Check(addr, index, started("older", time.Minute)), links.ErrReused)
	require.NoError(t, tracker.Check(addr, index, started("new", 0)))
}

// When these appeared is unknown. The first pod is accepted, and after it none whose
// containers started earlier.
func TestLinksOlderThanTracker(t *testing.T) {
	n := newNode(t)
	pod, _ := n.addPod("10.244.0.7", testbed.Ptp)
	index := n.call(pod, pod.Addr)
	tracker := n.track(links.Config{})
	require.NoError(t, tracker.Check(pod.Addr, index, started("first", time.Hour)))
	require.ErrorIs(t, tracker.Check(pod.Addr, index, started("older", 2*time.Hour)), links.ErrReused)
	require.ErrorIs(t, tracker.Check(pod.Addr, index, links.Pod{UID: "without containers"}), links.ErrReused)
	require.NoError(t, tracker.Check(pod.Addr, index, started("later", time.Minute)))
	require.ErrorIs(t, tracker.Check(pod.Addr, index, started("first", time.Hour)), links.ErrReused)

	another, _ := n.addPod("10.244.0.8", testbed.Ptp)
	require.NoError(t, tracker.Check(another.Addr, n.call(another, another.Addr), started("third", 0)))
}

func TestPodsWithoutStartedContainers(t *testing.T) {
	n := newNode(t)
	before, _ := n.addPod("10.244.0.7", testbed.Ptp)
	tracker := n.track(links.Config{})
	after, _ := n.addPod("10.244.0.8", testbed.Ptp)
	waiting := links.Pod{UID: "waiting"}
	require.NoError(t, tracker.Check(before.Addr, n.call(before, before.Addr), waiting), "the link's age is unknown")
	index := n.call(after, after.Addr)
	require.ErrorIs(t, tracker.Check(after.Addr, index, links.Pod{UID: "new"}), links.ErrReused)
	require.ErrorContains(t, tracker.Check(after.Addr, index, links.Pod{UID: "new"}), "have not started")
	require.NoError(t, tracker.Check(after.Addr, index, started("new", 0)))
}

// cilium_host is a veth with both ends on the node.
func TestOtherInterfaces(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	host, err := testbed.AddCiliumHost()
	require.NoError(t, err)
	defer func() { _ = netlink.LinkDel(host) }() // it goes with its peer, at some moment after that's namespace
	gateway := netip.MustParseAddr("10.245.0.7") // by the default route
	for _, name := range []string{"cilium_host", "lo"} {
		require.NoError(t, tracker.Check(gateway, indexOf(t, name), started("old", time.Hour)))
		require.NoError(t, tracker.Check(gateway, indexOf(t, name), started("older", 2*time.Hour)))
	}

	// An end that is moved to a pod makes it the pod's.
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	defer func() { assert.NoError(t, inside.Close()) }()
	peer, err := netlink.LinkByName("cilium_net")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetNsFd(peer, inside.FD()))
	require.ErrorIs(t, tracker.Check(netip.MustParseAddr("10.245.0.8"), indexOf(t, "cilium_host"), started("old", time.Hour)), links.ErrReused)
}

func TestStolenAddressWithOwnLink(t *testing.T) {
	for _, shape := range shapes {
		t.Run(string(shape), func(t *testing.T) {
			n := newNode(t)
			tracker := n.track(links.Config{})
			pod, _ := n.addPod("10.244.0.7", shape)
			thief, _ := n.addPod("10.244.0.8", shape)
			steal(t, thief, pod.Addr)
			_, err := n.tryCall(thief, pod.Addr, aMoment)
			require.Error(t, err, "although rp_filter is off")
			assert.NoError(t, tracker.Check(pod.Addr, n.call(pod, pod.Addr), started("a", 0)))
		})
	}
}

func BenchmarkCheck(b *testing.B) {
	for _, shape := range []testbed.Shape{testbed.Ptp, testbed.Bridge} {
		b.Run(string(shape), func(b *testing.B) {
			n := newNode(b)
			tracker := n.track(links.Config{AllowUnguarded: true})
			pod, _ := n.addPod("10.244.0.7", shape)
			index := n.call(pod, pod.Addr)
			claimed := started("a", 0)
			b.ReportAllocs()
			for b.Loop() {
				if err := tracker.Check(pod.Addr, index, claimed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A handshake over another interface than the replies' can only have been completed by
// guessing.
func TestAddressRoutedToAnotherPod(t *testing.T) {
	n := newNode(t)
	tracker := n.track(links.Config{})
	first, _ := n.addPod("10.244.0.7", testbed.Ptp)
	second, _ := n.addPod("10.244.0.8", testbed.Ptp)
	kept, over := n.call(first, first.Addr), n.call(second, second.Addr)
	one, two := started("a", 0), started("b", 0)
	require.NoError(t, tracker.Check(first.Addr, kept, one))
	require.ErrorIs(t, tracker.Check(second.Addr, kept, two), links.ErrReused, "over the first pod's link")
	assert.NoError(t, tracker.Check(first.Addr, kept, one), "still the first pod's link")
	assert.NoError(t, tracker.Check(second.Addr, over, two), "over its own link")
}
