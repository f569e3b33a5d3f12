package iptables_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestModeAuto(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	n.agent(iptables.Redirect) // on all addresses
	pods := &testbed.PodList{}
	cfg := n.config(iptables.ModeAuto)
	cfg.Pods = pods.Addresses
	r, _ := n.reconcile(cfg)
	becomes := func(mode iptables.Mode, why string) {
		t.Helper()
		n.eventually(func() bool {
			s := r.Status()
			return s.Err == nil && s.Mode == mode && strings.Contains(s.Reason, why)
		}, why)
		assert.Equal(t, "agent", n.ask())
	}
	becomes(iptables.DNAT, "no pod's interface is known yet")
	stopAsking := n.askAllTheTime() // while the mode changes

	pods.Set(n.pod.Addr)
	becomes(iptables.Redirect, "every interface that leads to a pod has an IPv4 address")

	routed, err := n.network.AddPod("10.244.0.8", testbed.Routed)
	require.NoError(t, err)
	pods.Set(n.pod.Addr, routed.Addr)
	becomes(iptables.DNAT, "which leads to pod address 10.244.0.8, has no IPv4 address")

	require.NoError(t, routed.Close())
	becomes(iptables.Redirect, "every interface") // the address leads to the default route now
	pods.Set(routed.Addr)
	becomes(iptables.DNAT, "pod address 10.244.0.8 is behind a gateway")
	pods.Set(n.pod.Addr)
	becomes(iptables.Redirect, "every interface")

	// An address that goes is noticed by itself.
	link, err := netlink.LinkByName("veth1")
	require.NoError(t, err)
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	require.NoError(t, err)
	require.Len(t, addrs, 1)
	stopAsking() // without the address the pod has no gateway
	require.NoError(t, netlink.AddrDel(link, &addrs[0]))
	n.eventually(func() bool { return r.Status().Mode == iptables.DNAT }, "the address is gone")
	assert.Zero(t, n.leaks.Load())
}

func TestRestartChangesNoRules(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			pods := &testbed.PodList{}
			cfg := n.config(iptables.ModeAuto)
			cfg.Pods = pods.Addresses
			pods.Set(n.pod.Addr)
			first, stop := n.reconcile(cfg)
			require.Equal(t, iptables.Redirect, first.Status().Mode)
			stop()

			pods.Set() // an agent that has not synced
			second, _ := n.reconcile(cfg)
			assert.Equal(t, iptables.Redirect, second.Status().Mode)
			pods.Set(n.pod.Addr)
			n.eventually(func() bool {
				return second.Status().Reason == "every interface that leads to a pod has an IPv4 address"
			}, "knows why")
			assert.Zero(t, second.Stats().Repairs)
			assert.Equal(t, uint64(1), second.Stats().Checks, "pods that come are no reason to look at the rules")
		})
	}
}

func TestDetectConflict(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	r, _ := n.reconcile(n.config(iptables.Redirect))
	for range 6 {
		n.iptables("-I", "PREROUTING", "1", "-p", "udp", "-j", "ACCEPT")
		n.eventually(n.inPlace, "first again")
	}
	n.eventually(func() bool { return len(r.Status().Notes) > 0 }, "noted")
	assert.Contains(t, r.Status().Notes[0], "another program keeps changing the rules: repaired")
	assert.Contains(t, r.Status().Notes[0], "nft monitor names the process")
	assert.NoError(t, r.Status().Err)
}
