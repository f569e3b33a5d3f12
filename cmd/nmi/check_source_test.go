package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
)

// The rest is for the e2e: it takes a node.
func TestACallerOverAnInterfaceThatIsGoneIsUnconfirmed(t *testing.T) {
	tracker, err := links.New(links.Config{})
	require.NoError(t, err)
	confirm := checkSource(tracker)
	err = confirm(netip.MustParseAddr("127.0.0.1"), 1<<30, &podresolver.Pod{UID: "a"})
	assert.ErrorIs(t, err, podresolver.ErrUnconfirmed)
	assert.ErrorIs(t, err, links.ErrReused)
}
