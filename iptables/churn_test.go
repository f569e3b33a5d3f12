package iptables_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestModeAutoWithPodChurn(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect) // on all addresses
			known := &testbed.PodList{}
			known.Set(n.pod.Addr)
			cfg := n.config(iptables.ModeAuto)
			cfg.Pods = known.Addresses
			r, _ := n.reconcile(cfg)
			becomes := func(mode iptables.Mode, when string) {
				t.Helper()
				n.eventually(func() bool { s := r.Status(); return s.Err == nil && s.Mode == mode }, when)
			}
			becomes(iptables.Redirect, "at the start")
			stopAsking := n.askAllTheTime()

			for range 2 {
				bridged, removeBridged := n.addPod("10.244.0.20", testbed.Bridge)
				neighbour, removeNeighbour := n.addPod("10.244.0.21", testbed.Bridge)
				known.Set(n.pod.Addr, bridged.Addr, neighbour.Addr)
				assert.Equal(t, "agent", ask(bridged), "before Pods has it")
				routed, removeRouted := n.addPod("10.244.0.30", testbed.Routed)
				known.Set(n.pod.Addr, bridged.Addr, neighbour.Addr, routed.Addr)
				becomes(iptables.DNAT, "a routed pod is there")
				for _, pod := range []*testbed.Pod{bridged, neighbour, routed} {
					assert.Equal(t, "agent", ask(pod), pod.Addr)
				}
				removeRouted()
				removeNeighbour()
				known.Set(n.pod.Addr, bridged.Addr)
				becomes(iptables.Redirect, "no routed pod is there")
				assert.Equal(t, "agent", ask(bridged))
				removeBridged() // and the bridge with it
				known.Set(n.pod.Addr)
			}

			// Another address for the pod's link. A bridge has the old one, so
			// that the pod still finds its gateway.
			n.addPod("10.244.0.20", testbed.Bridge)
			link, err := netlink.LinkByName(n.pod.Link)
			require.NoError(t, err)
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
			require.NoError(t, err)
			require.Len(t, addrs, 1)
			other, err := netlink.ParseAddr("10.244.3.1/32")
			require.NoError(t, err)
			require.NoError(t, netlink.AddrAdd(link, other))
			require.NoError(t, netlink.AddrDel(link, &addrs[0]))
			assert.Equal(t, "agent", n.ask(), "at the other address")
			stopAsking()
			assert.Zero(t, n.leaks.Load())
		})
	}
}
