package links

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// A flapping interface changes nothing that the Tracker keeps. All that does must be seen
// among its announcements.
func TestChangesOfAFlappingInterface(t *testing.T) {
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	tracker, err := New(Config{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, tracker.socket.close()) })
	link := addLink(t, inside, "flaps", 7001)
	index := link.Attrs().Index
	changes := func(change func() error) *iface {
		t.Helper()
		flap(t, inside, 5)
		require.NoError(t, change())
		tracker.mu.Lock()
		defer tracker.mu.Unlock()
		require.NoError(t, tracker.drainLocked())
		return tracker.ifaces[index]
	}

	added := changes(func() error { return nil })
	require.NotNil(t, added)
	assert.Equal(t, "flaps", added.name)
	assert.Equal(t, link.Attrs().HardwareAddr.String(), net.HardwareAddr(added.hardwareAddr).String())
	pod := Pod{"a", time.Now().Add(time.Minute)}
	require.NoError(t, tracker.Check(netip.MustParseAddr("10.244.1.1"), index, pod))
	appeared := added.appeared

	assert.Same(t, added, changes(func() error { return nil }), "nothing has changed")
	assert.Same(t, added, changes(func() error { return netlink.LinkSetAlias(link, "pod") }), "nor anything that is kept")
	assert.Equal(t, pod, added.owner)
	assert.Equal(t, appeared, added.appeared)

	assert.Same(t, added, changes(func() error {
		return netlink.LinkSetHardwareAddr(link, net.HardwareAddr{2, 0, 0, 0, 0, 7})
	}))
	assert.Equal(t, "02:00:00:00:00:07", net.HardwareAddr(added.hardwareAddr).String())
	assert.Same(t, added, changes(func() error { return netlink.LinkSetName(link, "renamed") }))
	assert.Equal(t, "renamed", added.name)
	assert.Equal(t, pod, added.owner)

	elsewhere, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, elsewhere.Close()) })
	require.Nil(t, changes(func() error { return netlink.LinkSetNsFd(link, elsewhere.FD()) }), "moved away")
	here, err := netns.Get()
	require.NoError(t, err)
	defer func() { assert.NoError(t, here.Close()) }()
	require.NoError(t, elsewhere.Do(func() error { return netlink.LinkSetNsFd(link, int(here)) }))
	back := changes(func() error { return nil })
	require.NotNil(t, back)
	assert.Zero(t, back.owner, "another interface, for all that is known")
	assert.True(t, back.appeared.After(appeared))
}

// A port that a bridge loses to another one takes the addresses behind it along.
func TestPortChangesBridge(t *testing.T) {
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	tracker, err := New(Config{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, tracker.socket.close()) })
	require.NoError(t, tracker.socket.join(unix.RTNLGRP_NEIGH))
	var bridges []netlink.Link
	for _, name := range []string{"first", "second"} {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		bridge := &netlink.Bridge{LinkAttrs: attrs}
		require.NoError(t, netlink.LinkAdd(bridge))
		t.Cleanup(func() { assert.NoError(t, netlink.LinkDel(bridge)) })
		bridges = append(bridges, bridge)
	}
	link := addLink(t, inside, "flaps", 7001)
	require.NoError(t, netlink.LinkSetMaster(link, bridges[0]))
	hardwareAddr := net.HardwareAddr{2, 0, 0, 0, 0, 8}
	require.NoError(t, netlink.NeighAppend(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: hardwareAddr, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP,
	}))
	addr := netip.MustParseAddr("10.244.1.1")
	tracker.mu.Lock()
	defer tracker.mu.Unlock()
	require.NoError(t, tracker.drainLocked())
	tracker.ports[addr] = port{bridge: bridges[0].Attrs().Index, index: link.Attrs().Index, hardwareAddr: string(hardwareAddr)}
	flap(t, inside, 5)
	require.NoError(t, netlink.LinkSetMaster(link, bridges[1]))
	require.NoError(t, tracker.drainLocked())
	assert.Empty(t, tracker.ports)
}

// Announcements that change nothing must cost little.
func TestFlappingAllocates(t *testing.T) {
	inside, err := testbed.NewNamespace()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, inside.Close()) })
	listener, err := subscribe()
	require.NoError(t, err)
	defer func() { assert.NoError(t, listener.close()) }()
	addLink(t, inside, "flaps", 7001)
	datagram, err := listener.receive()
	require.NoError(t, err)
	tracker, err := New(Config{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, tracker.socket.close()) })
	require.Contains(t, tracker.ifaces, 7001)
	tracker.mu.Lock()
	defer tracker.mu.Unlock()
	assert.Zero(t, testing.AllocsPerRun(100, func() { tracker.applyLocked(datagram) }))
}

// flap has a pod take its end of the link "flaps" down and up, which NET_ADMIN in its
// namespace allows. The kernel announces the state of the node's end twice each time.
func flap(tb testing.TB, inside *testbed.Namespace, times int) {
	tb.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Repeat("link set flaps down\nlink set flaps up\n", times))
	require.NoError(tb, inside.Start(cmd))
	require.NoError(tb, cmd.Wait())
}

// BenchmarkFlapping is a flapping interface, and the CPU time of the process whose Tracker
// hears of it. Some 3 µs an event of that is the benchmark's own.
func BenchmarkFlapping(b *testing.B) {
	inside, err := testbed.NewNamespace()
	require.NoError(b, err)
	b.Cleanup(func() { assert.NoError(b, inside.Close()) })
	link, err := testbed.AddLink("flaps", 7001, inside)
	require.NoError(b, err)
	b.Cleanup(func() { assert.NoError(b, netlink.LinkDel(link)) })
	tracker, err := New(Config{Logger: slog.New(slog.DiscardHandler)})
	require.NoError(b, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { tracker.Run(ctx) })
	b.Cleanup(func() { cancel(); running.Wait() })
	counter, err := subscribe()
	require.NoError(b, err)
	defer func() { assert.NoError(b, counter.close()) }()

	require.NoError(b, counter.raw.Control(func(fd uintptr) { // room for all announcements
		require.NoError(b, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20))
	}))

	used := cpuTime(b)
	b.ResetTimer()
	flap(b, inside, b.N)
	b.StopTimer()
	used = cpuTime(b) - used
	events := 0
	for {
		if _, err := counter.receive(); err != nil {
			require.ErrorIs(b, err, unix.EAGAIN)
			break
		}
		events++
	}
	b.ReportMetric(float64(used.Microseconds())/float64(events), "cpu-µs/event")
	b.ReportMetric(float64(events)/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(100*used.Seconds()/b.Elapsed().Seconds(), "%cpu")
}

// cpuTime is what this process has used.
func cpuTime(tb testing.TB) time.Duration {
	tb.Helper()
	var usage unix.Rusage
	require.NoError(tb, unix.Getrusage(unix.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
