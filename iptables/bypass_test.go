package iptables_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
)

func TestStatusBypass(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Routed)
	host, err := testbed.AddCiliumHost()
	require.NoError(t, err)
	defer func() { assert.NoError(t, netlink.LinkDel(host)) }()
	pods := &testbed.PodList{}
	pods.Set(n.pod.Addr)
	cfg := n.config(iptables.ModeAuto)
	cfg.Pods = pods.Addresses
	r, _ := n.reconcile(cfg)
	require.NoError(t, r.Status().Bypass, "no program")

	link, err := netlink.LinkByName(n.pod.Link)
	require.NoError(t, err)
	require.NoError(t, testbed.AttachTCX(link))
	other, _ := n.addPod("10.244.0.8", testbed.Routed) // the kernel does not announce programs
	pods.Set(n.pod.Addr, other.Addr)
	n.eventually(func() bool { return r.Status().Bypass != nil }, "noticed")
	assert.ErrorIs(t, r.Status().Bypass, links.ErrBypass)
	assert.ErrorContains(t, r.Status().Bypass, n.pod.Link+" has a tcx ingress program")
	assert.ErrorContains(t, r.Status().Bypass, "--redirect-mode=ebpf, or none with a local redirect policy (deploy/cilium)")
	assert.NoError(t, r.Status().Err, "the rules are written nevertheless")
	assert.True(t, n.inPlace())

	cfg.Mode = iptables.DNAT // the operator knows better
	chosen, _ := n.reconcile(cfg)
	require.NoError(t, chosen.Status().Bypass)
	require.Len(t, chosen.Status().Notes, 1)
	assert.Contains(t, chosen.Status().Notes[0], "mode dnat is set, although pods' packets may bypass iptables: cilium_host exists, and "+n.pod.Link+" has a tcx ingress program")
}
