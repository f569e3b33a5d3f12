package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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
