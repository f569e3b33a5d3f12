package iptables_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
)

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
	assert.ErrorIs(t, r.Status().Unguarded, links.ErrUnguarded)
	assert.ErrorContains(t, r.Status().Unguarded, "cbr0: nothing there stops ARP spoofing (CVE-2021-1677)")
	assert.ErrorContains(t, r.Status().Unguarded, "--allow-network-plugin-kubenet")
	assert.Empty(t, r.Status().Notes)

	pods.set(ptp.Addr)
	n.eventually(func() bool { return r.Status().Unguarded == nil }, "all is well")

	cfg.AllowUnguarded = true
	pods.set(n.pod.Addr)
	allowed, _ := n.reconcile(cfg)
	assert.NoError(t, allowed.Status().Unguarded)
}
