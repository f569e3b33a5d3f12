package ebpf_test

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	cilium "github.com/cilium/ebpf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The cgroups of pods' containers, as the kubelet makes them.
const (
	guaranteedA = "kubepods/pod" + uidA + "/container"
	burstableB  = "kubepods/burstable/pod" + uidB + "/container"
)

// Each way to connect is answered, with the caller that made it.
func TestConnect(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	a, b := n.addPod("10.244.0.7", guaranteedA, testbed.Routed), n.addPod("10.244.0.8", burstableB, testbed.Ptp)
	for _, how := range []string{"blocking", "non-blocking", "again", "mapped", "io_uring", "fastopen", "fastopen connect", "mptcp"} {
		t.Run(how, func(t *testing.T) {
			assert.Equal(t, uidA, a.ask(how))
			assert.Equal(t, uidB, b.ask(how))
		})
	}
	assert.Equal(t, uidA, a.do(request{How: "blocking", Bind: "10.244.0.7:40000"}).Answer)
	assert.Zero(t, n.leaks.Load())
}

// On a bridge, and with the names that systemd's driver gives.
func TestCgroupNames(t *testing.T) {
	n := newNode(t)
	n.enter("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + agentUID + ".slice/agent.scope")
	n.ensure()
	n.agent()
	for i, tc := range []struct{ cgroup, uid string }{
		{"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podaaaaaaaa_0000_4000_8000_000000000001.slice/cri-containerd-1.scope", uidA},
		{"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-podbbbbbbbb_0000_4000_8000_000000000002.slice/cri-containerd-2.scope", uidB},
		{"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod0123456789abcdef0123456789abcdef.slice/3.scope", "0123456789abcdef0123456789abcdef"},
	} {
		assert.Equal(t, tc.uid, n.addPod("10.244.0."+strconv.Itoa(7+i), tc.cgroup, testbed.Bridge).ask("blocking"), tc.cgroup)
	}
	assert.Zero(t, n.leaks.Load())
}

// What a pod makes in its own cgroup changes nothing.
func TestCgroupsOfPod(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	b := n.addPod("10.244.0.8", burstableB, testbed.Routed)
	assert.Equal(t, uidB, b.ask("blocking"))
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	nested := filepath.Join(a.dir, "pod"+uidB, "pod"+uidB)
	require.NoError(t, os.MkdirAll(nested, 0o755))
	require.Equal(t, "moved", a.do(request{How: "move", Cgroup: nested}).Answer)
	assert.Equal(t, uidA, a.ask("blocking"), "nested")

	threaded := filepath.Join(b.dir, "threaded")
	require.NoError(t, os.MkdirAll(threaded, 0o755))
	require.NoError(t, os.WriteFile(threaded+"/cgroup.type", []byte("threaded"), 0o644))
	got := b.do(request{How: "threaded", Cgroup: threaded})
	assert.Equal(t, uidB, got.Answer, got.Err)
	assert.Zero(t, n.leaks.Load())
}

// With TCP fast open for all listeners (tcp_fastopen 0x400) accept would not wait for the client.
func TestFastOpenServer(t *testing.T) {
	const forAll = "1539" // client, server, for all listeners, without cookies: 0x603
	n := newNode(t)
	before, err := os.ReadFile("/proc/sys/net/ipv4/tcp_fastopen")
	require.NoError(t, err)
	set := func(value string) {
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte(value), 0o644))
	}
	set(forAll)
	t.Cleanup(func() { set(string(before)) })
	n.ensure()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	a.do(request{How: "run", Command: "sysctl -w net.ipv4.tcp_fastopen=" + forAll})

	ln, err := net.Listen("tcp4", target.String())
	require.NoError(t, err)
	stop := n.serve(ln, n.answer)
	assert.Equal(t, refused, a.ask("fastopen"), "the test shows nothing if that works")
	stop()
	n.agent()
	for range 20 {
		assert.Equal(t, uidA, a.ask("fastopen"))
		assert.Equal(t, uidA, a.ask("fastopen connect"))
	}
	assert.Zero(t, n.leaks.Load())
}

// Two pods in one network namespace use one port in turn.
func TestPortReuse(t *testing.T) {
	n := newNode(t)
	n.cfg.HostNetworkAll = true
	n.ensure()
	n.agent()
	a, b := n.addHostPod(guaranteedA), n.addHostPod(burstableB)
	for range 50 {
		require.Equal(t, uidA, a.do(request{How: "blocking", Bind: "10.0.0.4:40000"}).text())
		require.Equal(t, uidB, b.do(request{How: "blocking", Bind: "10.0.0.4:40000"}).text())
	}
	assert.Zero(t, n.leaks.Load())
}

// A pod with NET_ADMIN, if only in a network namespace that it made, takes the addresses of
// the agent and of another pod, and keeps a connection between them.
func TestForgedConnection(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	evil, victim := n.addForger(guaranteedA, "10.244.0.8"), n.addPod("10.244.0.8", burstableB, testbed.Routed)
	require.Equal(t, "flooded", evil.do(request{How: "flood", Bind: elsewhere}).Answer)
	for i := range 20 {
		require.Equal(t, "held", evil.do(request{How: "hold", Bind: "10.244.0.8:40000"}).Answer)
		require.Equal(t, i+1, n.handshakes(), "what is tried here")
		assert.Equal(t, uidB, victim.do(request{How: "blocking", Bind: "10.244.0.8:40000"}).text())
		require.Equal(t, "closed", evil.do(request{How: "close"}).Answer)
	}
	assert.Zero(t, n.leaks.Load())
}

// A pod fills the map of handshakes with connections of its own: others are served.
func TestManyHandshakes(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	evil, victim := n.addForger(guaranteedA, "10.244.0.8"), n.addPod("10.244.0.8", burstableB, testbed.Routed)
	var asking sync.WaitGroup
	done := make(chan struct{})
	asking.Go(func() {
		for {
			assert.Equal(t, uidB, victim.ask("blocking"))
			select {
			case <-done:
				return
			default:
			}
		}
	})
	const more = 18_000 // than the map has room for
	got := evil.do(request{How: "flood", Bind: elsewhere, Count: more})
	assert.Equal(t, "flooded", got.Answer, got.Err)
	assert.Equal(t, uidB, victim.ask("blocking"))
	close(done)
	asking.Wait()
	assert.Zero(t, n.leaks.Load())
}

// pinnedMap opens one of the programs' maps.
func (n *node) pinnedMap(name string) *cilium.Map {
	n.t.Helper()
	m, err := cilium.LoadPinnedMap(filepath.Join(n.cfg.Pins, "maps-1", name), nil)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { _ = m.Close() })
	return m
}

// handshakes counts those whose callers are stored.
func (n *node) handshakes() (count int) {
	n.t.Helper()
	m := n.pinnedMap("clients")
	var key uint64
	var value [4]uint64
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		count++
	}
	require.NoError(n.t, entries.Err())
	return count
}

// elsewhere is where a forger's connections to the agent lead: to a port other than the agent's, so
// that the programs take the server for no agent, and what they have noted stays.
const elsewhere = "0.0.0.0:9999"

// addForger adds a pod whose network is all its own: it has these addresses and the agent's, and
// leads nowhere else.
func (n *node) addForger(cgroup string, addrs ...string) *pod {
	n.t.Helper()
	ns, err := testbed.NewNamespace()
	require.NoError(n.t, err)
	n.t.Cleanup(func() { assert.NoError(n.t, ns.Close()) })
	require.NoError(n.t, ns.Do(func() error {
		if err := os.WriteFile("/proc/sys/net/core/somaxconn", []byte("65535"), 0o644); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, addr := range append(addrs, target.Addr().String()) {
			parsed, err := netlink.ParseAddr(addr + "/32")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(lo, parsed); err != nil {
				return err
			}
		}
		return nil
	}))
	p := n.start(cgroup, ns)
	got := p.do(request{How: "run", Command: "iptables -t nat -A OUTPUT -p tcp --dport 2579 -j REDIRECT --to-ports 9999"})
	require.Empty(n.t, got.Err, got.Answer)
	return p
}

// A sidecar to which rules in the pod redirect all connections dials the agent itself.
func TestSidecar(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	sidecar := n.start("kubepods/pod"+uidA+"/sidecar", a.ns)
	require.Equal(t, "listening", sidecar.do(request{How: "relay", Bind: "0.0.0.0:15001"}).Answer)
	got := sidecar.do(request{How: "run", Command: "iptables -t nat -A OUTPUT -p tcp -m owner ! --gid-owner " + strconv.Itoa(sidecarGID) + " -j REDIRECT --to-ports 15001"})
	require.Empty(t, got.Err, got.Answer)
	assert.Equal(t, "by way of "+target.String()+": "+uidA, a.ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

// Host-network pods reach the metadata service as the node does, unless all are redirected.
func TestHostNetwork(t *testing.T) {
	n := newNode(t)
	n.agent()
	n.ensure()
	a := n.addHostPod(guaranteedA)
	for _, how := range []string{"blocking", "non-blocking", "mapped"} {
		assert.Equal(t, "imds", a.ask(how), how)
	}
	n.cfg.HostNetworkAll = true
	n.ensure()
	for _, how := range []string{"blocking", "non-blocking", "mapped"} {
		assert.Equal(t, uidA, a.ask(how), how)
	}
	assert.EqualValues(t, 3, n.leaks.Load())
}

// Whether the caller is known does not depend on how fast the agent accepts.
func TestManyConnections(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	var asking sync.WaitGroup
	for i := range 8 {
		uid := uidA[:len(uidA)-1] + strconv.Itoa(i)
		p := n.addPod("10.244.0."+strconv.Itoa(7+i), "kubepods/burstable/pod"+uid+"/c", testbed.Routed)
		asking.Go(func() {
			for range 500 {
				if !assert.Equal(t, uid, p.ask("blocking")) {
					return
				}
			}
		})
	}
	asking.Wait()
	assert.Zero(t, n.leaks.Load())
}

// Host-network pods with identities of their own are redirected, however they were bound.
func TestBind(t *testing.T) {
	n := newNode(t)
	n.agent()
	p := n.ensure()
	a, b := n.addHostPod(guaranteedA), n.addHostPod(burstableB)
	bind := func(missing int, bound, unbound []string) {
		t.Helper()
		got, err := p.Bind(bound, unbound)
		require.NoError(t, err)
		assert.Equal(t, missing, got)
	}
	bind(1, []string{uidA, "not-there-yet"}, []string{uidB})
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Equal(t, "imds", b.ask("blocking"))
	bind(0, []string{uidB}, []string{uidA})
	assert.Equal(t, "imds", a.ask("blocking"))
	assert.Equal(t, uidB, b.ask("blocking"))
	p = n.ensure() // another agent's programs have the same map
	assert.Equal(t, uidB, b.ask("blocking"))
	bind(0, nil, []string{uidA, uidB})
	assert.Equal(t, "imds", b.ask("blocking"))
	assert.EqualValues(t, 3, n.leaks.Load())
}

// A bound host-network pod whose object is gone, but not its processes, does not get the node's identity.
func TestBindWithoutObject(t *testing.T) {
	n := newNode(t)
	n.agent()
	p := n.ensure()
	a := n.addHostPod(guaranteedA)
	_, err := p.Bind([]string{uidA}, nil)
	require.NoError(t, err)
	_, err = p.Bind(nil, nil)
	require.NoError(t, err)
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Zero(t, n.leaks.Load())

	var st unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Dir(a.dir), &st))
	a.kill()
	require.NoError(t, os.Remove(filepath.Dir(a.dir)))
	assert.Contains(t, n.bound(), st.Ino)
	_, err = p.Bind(nil, nil)
	require.NoError(t, err)
	assert.NotContains(t, n.bound(), st.Ino, "it goes with its cgroup")
}

// bound returns the cgroups of the redirected host-network pods.
func (n *node) bound() (ids []uint64) {
	n.t.Helper()
	m, err := cilium.LoadPinnedMap(filepath.Join(n.cfg.Pins, "maps-1", "bound"), nil)
	require.NoError(n.t, err)
	defer m.Close()
	var id uint64
	var value uint8
	entries := m.Iterate()
	for entries.Next(&id, &value) {
		ids = append(ids, id)
	}
	require.NoError(n.t, entries.Err())
	return ids
}
