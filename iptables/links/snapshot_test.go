package links_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/links"
)

// An agent takes over while the API server still names pods that have ended.
func TestSnapshot(t *testing.T) {
	n := newNode(t)
	before := n.track(links.Config{})
	owner, ended := started("owner", time.Minute), started("ended", time.Minute)
	departed, removeDeparted := n.addPod("10.244.0.6", testbed.Ptp)
	gone := started("departed", 0)
	require.NoError(t, before.Check(departed.Addr, n.call(departed, departed.Addr), gone))
	removeDeparted()
	owned, _ := n.addPod("10.244.0.7", testbed.Ptp)
	restarted := started("owner", 0)
	require.NoError(t, before.Check(owned.Addr, n.call(owned, owned.Addr), restarted))
	next, _ := n.addPod("10.244.0.8", testbed.Ptp) // where ended was
	require.ErrorIs(t, before.Check(next.Addr, n.call(next, next.Addr), ended), links.ErrReused)

	after := n.track(links.Config{})
	require.NoError(t, after.Expect(next.Addr, ended), "it does not know better yet")
	all, err := before.Export()
	require.NoError(t, err)
	encoded, err := json.Marshal(all) // as from agent to agent
	require.NoError(t, err)
	var received []links.Snapshot
	require.NoError(t, json.Unmarshal(encoded, &received))
	require.NoError(t, after.Import(received))
	index := n.call(next, next.Addr)
	require.ErrorIs(t, after.Check(next.Addr, index, ended), links.ErrReused)
	require.NoError(t, after.Check(next.Addr, index, started("next", 0)))
	index = n.call(owned, owned.Addr)
	require.ErrorIs(t, after.Check(owned.Addr, index, started("another", time.Minute)), links.ErrReused)
	require.NoError(t, after.Check(owned.Addr, index, owner))
	elsewhere, _ := n.addPod("10.244.0.6", testbed.Ptp)
	require.ErrorIs(t, after.Check(elsewhere.Addr, n.call(elsewhere, elsewhere.Addr), gone), links.ErrReused)

	third := n.track(links.Config{})
	for i := range all { // as if all these interfaces had been replaced meanwhile
		all[i].HardwareAddr = []byte("other")
	}
	require.NoError(t, third.Import(all))
	assert.NoError(t, third.Check(next.Addr, n.call(next, next.Addr), ended), "what it knows is not of this interface")
	assert.ErrorIs(t, third.Check(owned.Addr, n.call(owned, owned.Addr), restarted), links.ErrReused, "it was seen on another interface")
}
