package ebpf_test

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/ebpf"
)

// watch counts the IPv4 packets that arrive at the metadata service from an address.
func (n *node) watch(from [4]byte) *atomic.Int32 {
	n.t.Helper()
	var seen atomic.Int32
	const all = unix.ETH_P_IP<<8&0xff00 | unix.ETH_P_IP>>8 // in network byte order
	var fd int
	require.NoError(n.t, n.network.Metadata.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		return err
	}))
	tick := unix.NsecToTimeval(int64(50 * time.Millisecond))
	require.NoError(n.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tick))
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			var p [128]byte
			if size, err := unix.Read(fd, p[:]); err == nil && size >= 20 && [4]byte(p[12:16]) == from {
				seen.Add(1)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	}()
	n.t.Cleanup(func() { close(done); <-ended; assert.NoError(n.t, unix.Close(fd)) })
	return &seen
}

// No packet of a pod reaches the metadata service, by whatever socket; connections from before the
// programs end. Here nothing else keeps the pod from it.
func TestEgress(t *testing.T) {
	n := newNode(t)
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	seen := n.watch([4]byte{10, 244, 0, 7})
	hows := []string{"udp", "icmp", "raw"}
	for _, how := range hows {
		before := seen.Load()
		a.do(request{How: how})
		require.Eventually(t, func() bool { return seen.Load() > before }, patience, time.Millisecond, "%s arrives without the programs", how)
	}
	held := n.holdOpen()
	require.Equal(t, "held", a.do(request{How: "hold", Address: held}).Answer)
	require.Equal(t, "echo", a.do(request{How: "send"}).Answer)

	n.ensure()
	n.agent()
	got := a.do(request{How: "send", Timeout: aMoment})
	assert.Empty(t, got.Answer)
	a.do(request{How: "close"})
	before := seen.Load()
	for _, how := range hows {
		assert.Contains(t, a.do(request{How: how}).Err, "operation not permitted", how)
	}
	time.Sleep(aMoment) // for packets that must not arrive
	assert.Equal(t, before, seen.Load())
	assert.Equal(t, uidA, a.ask("blocking"))
}

// A host-network pod that is to be redirected keeps no connection from before.
func TestEgressOnceBound(t *testing.T) {
	for name, redirect := range map[string]func(*node, *ebpf.Programs) error{
		"bound": func(_ *node, p *ebpf.Programs) error { _, err := p.Bind([]string{uidA}, nil); return err },
		"all":   func(n *node, _ *ebpf.Programs) error { n.cfg.HostNetworkAll = true; n.ensure(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.Metadata = netip.MustParseAddrPort("169.254.169.254:8080")
			held := n.holdOpen()
			p := n.ensure()
			a := n.addHostPod(guaranteedA)
			require.Equal(t, "held", a.do(request{How: "hold", Address: held}).Answer)
			require.Equal(t, "echo", a.do(request{How: "send"}).Answer, "it reaches the metadata service itself")
			require.NoError(t, redirect(n, p))
			assert.Empty(t, a.do(request{How: "send", Timeout: aMoment}).Answer)
		})
	}
}

// holdOpen opens a second port of the metadata service, which answers more than once on a
// connection, and returns its address.
func (n *node) holdOpen() string {
	n.t.Helper()
	const address = "169.254.169.254:8080"
	ln, err := n.network.Metadata.Listen(address)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var p [64]byte
				for {
					if _, err := c.Read(p[:]); err != nil {
						return
					}
					_, _ = c.Write([]byte("echo"))
				}
			}()
		}
	}()
	return address
}

// The agent itself reaches the metadata service, and of the agents before it the last.
func TestExempt(t *testing.T) {
	n := newNode(t)
	const old, older = "kubepods/podold/agent", "kubepods/podolder/agent"
	for _, cgroup := range []string{older, old, ownCgroup} {
		n.enter(cgroup)
		n.ensure()
	}
	assert.Equal(t, "imds", n.addPod("10.244.0.7", ownCgroup, testbed.Routed).askBriefly())
	assert.Equal(t, "imds", n.addPod("10.244.0.8", old, testbed.Routed).askBriefly())
	assert.Equal(t, refused, n.addPod("10.244.0.9", older, testbed.Routed).askBriefly())
	assert.Equal(t, refused, n.addPod("10.244.0.10", "kubepods/pod"+agentUID+"/another", testbed.Routed).askBriefly(), "another container of the agent's pod")
	assert.EqualValues(t, 2, n.leaks.Load())
}

// A process of the node that was handed a pod's socket is not that pod, and the other way round.
func TestForeignSocket(t *testing.T) {
	n := newNode(t)
	p := n.ensure()
	ln := n.listen()
	defer ln.Close()
	c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(c)
	n.enter(".")
	assert.ErrorIs(t, unix.Connect(c, &unix.SockaddrInet4{Port: int(target.Port()), Addr: target.Addr().As4()}), unix.EPERM)

	// Not below the programs at all.
	outside, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(outside)
	require.NoError(t, unix.Connect(outside, &unix.SockaddrInet4{Port: int(target.Port()), Addr: target.Addr().As4()}))
	accepted, err := ln.AcceptTCP()
	require.NoError(t, err)
	defer accepted.Close()
	_, err = p.Caller(accepted)
	assert.ErrorIs(t, err, ebpf.ErrNotRedirected)
}
