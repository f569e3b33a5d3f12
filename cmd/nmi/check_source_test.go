package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
)

// The rest takes a node: see deploy/e2e.
func TestCallerOnARemovedInterfaceIsUnconfirmed(t *testing.T) {
	tracker, err := links.New(links.Config{})
	require.NoError(t, err)
	check := checkSource(tracker)
	err = check(netip.MustParseAddr("127.0.0.1"), 1<<30, &podresolver.Pod{UID: "a"})
	assert.ErrorIs(t, err, podresolver.ErrUnconfirmed)
	assert.ErrorIs(t, err, links.ErrReused)
}

func TestDestinations(t *testing.T) {
	loopback := netip.MustParseAddr("127.0.0.1")
	for _, tc := range []struct {
		flags []string
		want  []netip.Addr
	}{
		{nil, nil},
		{[]string{"--redirect-mode=dnat"}, nil},
		{[]string{"--redirect-mode=ebpf", "--host-token-uids="}, []netip.Addr{iptables.DefaultAddress}},
		{[]string{"--redirect-mode=ebpf", "--redirect-address=10.0.0.4"}, []netip.Addr{netip.MustParseAddr("10.0.0.4"), loopback}},
	} {
		c, err := parse(append(tc.flags, "--node=node1")...)
		require.NoError(t, err)
		assert.Equal(t, tc.want, c.destinations(), tc.flags)
	}
}
