package links

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// addLink makes a pod's link, and index 0 leaves its index to the kernel.
func addLink(t *testing.T, inside *testbed.Namespace, name string, index int) netlink.Link {
	t.Helper()
	link, err := testbed.AddLink(name, index, inside)
	require.NoError(t, err)
	t.Cleanup(func() { _ = netlink.LinkDel(link) })
	return link
}

// The kernel drops announcements that are not read in time. Here the Tracker is not
// running.
func TestLostAnnouncements(t *testing.T) {
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	tracker, err := New(Config{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, tracker.socket.close()) })
	require.NoError(t, tracker.socket.raw.Control(func(fd uintptr) {
		require.NoError(t, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096))
	}))
	drain := func() {
		tracker.mu.Lock()
		defer tracker.mu.Unlock()
		require.NoError(t, tracker.drainLocked())
	}
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}) }
	old := Pod{"old", time.Now().Truncate(time.Second)}

	stays := addLink(t, inside, "stays", 7001).Attrs().Index
	goes := addLink(t, inside, "goes", 7002)
	reused := addLink(t, inside, "reused", 7003)
	require.NoError(t, tracker.Check(addr(1), stays, Pod{"stays", old.Started}))
	require.NoError(t, tracker.Check(addr(2), goes.Attrs().Index, Pod{"goes", old.Started}))
	require.NoError(t, tracker.Check(addr(3), reused.Attrs().Index, Pod{"reused", old.Started}))
	listing, upTo := tracker.events.listing, tracker.events.readUntil

	for i := range 20 { // more than the buffer holds
		require.NoError(t, netlink.LinkDel(addLink(t, inside, fmt.Sprintf("noise%d", i), 0)))
	}
	require.NoError(t, netlink.LinkDel(goes))
	require.NoError(t, netlink.LinkDel(reused))
	again := addLink(t, inside, "again", 7003)
	fresh := addLink(t, inside, "fresh", 0)
	drain()
	require.Greater(t, tracker.events.listing, listing, "announcements were lost, and there was a new listing")

	require.NoError(t, tracker.Check(addr(1), stays, Pod{"stays", old.Started}))
	require.ErrorIs(t, tracker.Check(addr(2), goes.Attrs().Index, Pod{"goes", old.Started}), ErrReused, "gone")
	require.ErrorIs(t, tracker.Check(addr(3), again.Attrs().Index, Pod{"reused", old.Started}), ErrReused, "another interface with the same index")
	for _, link := range []netlink.Link{again, fresh} {
		assert.Equal(t, upTo, tracker.ifaces[link.Attrs().Index].appeared, "the earliest time at which it may have appeared")
	}
	require.ErrorIs(t, tracker.Check(addr(4), fresh.Attrs().Index, Pod{"never seen", old.Started.Add(-time.Minute)}), ErrReused)
	require.NoError(t, tracker.Check(addr(4), fresh.Attrs().Index, Pod{"new", old.Started.Add(time.Minute)}))
	drain()
	assert.True(t, tracker.events.readUntil.After(upTo))
}

func TestDeletedInterfaces(t *testing.T) {
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	tracker, err := New(Config{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, tracker.socket.close()) })
	before := len(tracker.ifaces)
	for i := range 20 {
		link := addLink(t, inside, "pod", 0)
		require.NoError(t, tracker.Check(netip.MustParseAddr("10.244.1.1"), link.Attrs().Index, Pod{fmt.Sprint(i), time.Now().Add(time.Minute)}))
		require.NoError(t, netlink.LinkDel(link))
	}
	require.ErrorIs(t, tracker.Check(netip.MustParseAddr("10.244.1.1"), 9999, Pod{UID: "any"}), ErrReused)
	assert.Len(t, tracker.ifaces, before)
	assert.Equal(t, 20, tracker.departed.Len())
}
