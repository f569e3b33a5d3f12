package ebpf_test

import (
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cilium "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/ebpf"
)

var allHooks = []string{"egress", "sock_ops", "connect6", "connect4"}

// Without an agent connections are refused, those of pods that start later, too.
func TestAgentDead(t *testing.T) {
	n := newNode(t)
	stop := n.agent()
	p := n.ensure()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	require.Equal(t, uidA, a.ask("blocking"))
	stop()
	p.Close()
	b := n.addPod("10.244.0.8", burstableB, testbed.Routed)
	for _, how := range []string{"blocking", "mapped", "io_uring", "mptcp"} {
		assert.Contains(t, a.do(request{How: how}).Err, "refused", how)
		assert.Contains(t, b.do(request{How: how}).Err, "refused", how)
	}
	assert.Zero(t, n.leaks.Load())

	n.ensure()
	n.agent()
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Equal(t, uidB, b.ask("blocking"))
}

// A second Ensure changes nothing; the agent's successor replaces the programs while pods connect,
// and both know the callers.
func TestSuccessor(t *testing.T) {
	n := newNode(t)
	n.agent()
	first := ebpf.New(n.cfg)
	defer first.Close()
	res, err := first.Ensure()
	require.NoError(t, err)
	assert.Equal(t, ebpf.Result{Written: allHooks}, res)
	n.programs.Store(first)
	res, err = first.Ensure()
	require.NoError(t, err)
	assert.Equal(t, ebpf.Result{}, res)

	done := make(chan struct{})
	var asking sync.WaitGroup
	var asked atomic.Int64
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	asking.Go(func() {
		for {
			if !assert.Equal(t, uidA, a.ask("blocking"), "connection %d", asked.Load()+1) {
				return
			}
			asked.Add(1)
			select {
			case <-done:
				return
			default:
			}
		}
	})
	for range 20 {
		next := ebpf.New(n.cfg)
		res, err := next.Ensure()
		require.NoError(t, err)
		assert.Equal(t, ebpf.Result{Written: allHooks}, res)
		next.Close() // what is pinned stays; the first knows the callers all the same
		before := asked.Load()
		require.Eventually(t, func() bool { return t.Failed() || asked.Load() > before+1 }, patience, time.Millisecond, "connections go on")
	}
	close(done)
	asking.Wait()
	assert.Zero(t, n.leaks.Load())
	res, err = first.Ensure() // the other one has given up
	require.NoError(t, err)
	assert.Equal(t, ebpf.Result{Written: allHooks, Lost: allHooks}, res)
}

// What another program removes is put back.
func TestLostLinks(t *testing.T) {
	n := newNode(t)
	n.agent()
	p := n.ensure()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	for name, remove := range map[string]func(pin string){
		"pin removed": func(pin string) {
			l, err := link.LoadPinnedLink(pin, nil) // stays attached beside the next
			require.NoError(t, err)
			t.Cleanup(func() { _ = l.Close() })
			require.NoError(t, os.Remove(pin))
		},
		"detached": func(pin string) {
			l, err := link.LoadPinnedLink(pin, nil)
			require.NoError(t, err)
			defer l.Close()
			require.NoError(t, l.(interface{ Detach() error }).Detach())
		},
	} {
		for _, hook := range allHooks {
			remove(filepath.Join(n.cfg.Pins, "links", hook))
			res, err := p.Ensure()
			require.NoError(t, err, name)
			assert.Equal(t, ebpf.Result{Written: []string{hook}, Lost: []string{hook}}, res, name)
			assert.Equal(t, uidA, a.ask("blocking"), name)
		}
	}
	assert.Zero(t, n.leaks.Load())
}

// Also when all that is pinned is removed, be it by hand.
func TestLostDirectory(t *testing.T) {
	n := newNode(t)
	n.agent()
	p := n.ensure()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	host := n.addHostPod(burstableB)
	_, err := p.Bind([]string{uidB}, nil)
	require.NoError(t, err)
	require.NoError(t, os.RemoveAll(n.cfg.Pins))
	res, err := p.Ensure()
	require.NoError(t, err)
	assert.Equal(t, ebpf.Result{Written: allHooks, Lost: allHooks}, res)
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Equal(t, uidB, host.ask("blocking"), "who was bound")
	n.ensure() // the next agent has the same maps
	assert.Equal(t, uidB, host.ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

// The cgroup of all pods is another one after the kubelet's driver has changed: the links died with
// it.
func TestCgroupReplaced(t *testing.T) {
	n := newNode(t)
	const old = "old.slice/old-kubepods.slice/old-kubepods-podold.slice/agent"
	n.enter(old)
	stop := n.agent()
	p := n.ensure()
	a := n.addPod("10.244.0.7", "old.slice/old-kubepods.slice/old-kubepods-podaaaa.slice/1", testbed.Routed)
	require.Equal(t, "aaaa", a.ask("blocking"))
	a.kill()
	n.enter(ownCgroup)
	removeTree(filepath.Join(n.tree, "old.slice"))
	require.NoDirExists(t, filepath.Join(n.tree, "old.slice"))
	res, err := p.Ensure()
	require.NoError(t, err)
	assert.Equal(t, allHooks, res.Written)
	b := n.addPod("10.244.0.8", burstableB, testbed.Routed)
	assert.Equal(t, refused, b.ask("blocking"), "the listener is not in the cgroup of all pods any more")
	stop()
	n.agent()
	assert.Equal(t, uidB, b.ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

// A listener keeps working when the container that opened it is gone, as after a handover.
func TestInheritedListener(t *testing.T) {
	n := newNode(t)
	const old = "kubepods/podold/agent"
	n.enter(old)
	n.agent()
	n.ensure()
	n.enter(ownCgroup)
	removeTree(filepath.Join(n.tree, "kubepods", "podold"))
	require.NoDirExists(t, filepath.Join(n.tree, "kubepods", "podold"))
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	assert.Equal(t, uidA, a.ask("blocking"))
	n.ensure() // its programs reach the listener, too
	assert.Equal(t, uidA, a.ask("blocking"))
	for _, hook := range allHooks { // and new links
		require.NoError(t, os.Remove(filepath.Join(n.cfg.Pins, "links", hook)))
	}
	n.ensure()
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

func TestCleanup(t *testing.T) {
	n := newNode(t)
	n.agent()
	n.ensure()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	require.Equal(t, uidA, a.ask("blocking"))
	removed, err := ebpf.Cleanup(n.cfg.Pins)
	require.NoError(t, err)
	assert.True(t, removed)
	assert.Equal(t, "imds", a.ask("blocking"))
	assert.NoDirExists(t, n.cfg.Pins)
	removed, err = ebpf.Cleanup(n.cfg.Pins)
	require.NoError(t, err)
	assert.False(t, removed)

	other := t.TempDir()
	require.NoError(t, os.WriteFile(other+"/file", nil, 0o600))
	_, err = ebpf.Cleanup(other)
	require.ErrorContains(t, err, "BPF file system")
	assert.FileExists(t, other+"/file")
}

// rewriter is a program like GuestProxyAgent's: it turns a connection to the metadata service into
// one to a proxy of its own.
func rewriter(t *testing.T) *cilium.Program {
	t.Helper()
	const userIP4, userPort = 4, 24 // of struct bpf_sock_addr
	p, err := cilium.NewProgram(&cilium.ProgramSpec{
		Type: cilium.CGroupSockAddr, AttachType: cilium.AttachCGroupInet4Connect, License: "MIT",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, userIP4, asm.Word),
			asm.JNE.Imm32(asm.R2, -0x01560157, "out"), // 169.254.169.254 in network byte order
			asm.Mov.Imm32(asm.R2, 0x0100007f),         // 127.0.0.1
			asm.StoreMem(asm.R1, userIP4, asm.R2, asm.Word),
			asm.Mov.Imm32(asm.R2, 0x080c), // 3080
			asm.StoreMem(asm.R1, userPort, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// A program like GuestProxyAgent's on a cgroup above gets none of the pods' connections.
func TestProgramAbove(t *testing.T) {
	const none, override, multi = 0, 1, 2 // BPF_F_ALLOW_OVERRIDE, BPF_F_ALLOW_MULTI
	for name, flags := range map[string]uint32{"none": none, "override": override, "multi": multi} {
		for _, first := range []bool{true, false} {
			t.Run(name+map[bool]string{true: ", before", false: ", after"}[first], func(t *testing.T) {
				n := newNode(t)
				above, err := os.Open(n.tree)
				require.NoError(t, err)
				t.Cleanup(func() { _ = above.Close() })
				program := rewriter(t)
				attach := func() {
					require.NoError(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(above.Fd()), Program: program, Attach: cilium.AttachCGroupInet4Connect, Flags: flags}))
					t.Cleanup(func() {
						assert.NoError(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(above.Fd()), Program: program, Attach: cilium.AttachCGroupInet4Connect}))
					})
				}
				a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
				if first {
					attach()
					assert.Contains(t, a.do(request{How: "blocking"}).Err, "refused", "nothing listens there: the program works")
				}
				n.agent()
				p := ebpf.New(n.cfg)
				defer p.Close()
				_, err = p.Ensure()
				if flags == none && first {
					require.ErrorContains(t, err, "a program on a cgroup above")
					assert.NotEqual(t, "imds", a.askBriefly())
					assert.Zero(t, n.leaks.Load())
					return
				}
				require.NoError(t, err)
				n.programs.Store(p)
				if !first {
					attach()
				}
				assert.Equal(t, uidA, a.ask("blocking"))
				assert.Equal(t, uidA, a.ask("mapped"))
				assert.Zero(t, n.leaks.Load())
			})
		}
	}
}

// One on the same cgroup that was there first hides the metadata service, and is named.
func TestProgramBeside(t *testing.T) {
	n := newNode(t)
	n.agent()
	dir, err := os.Open(n.kubepods)
	require.NoError(t, err)
	defer dir.Close()
	other, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: rewriter(t), Attach: cilium.AttachCGroupInet4Connect})
	require.NoError(t, err)
	p := ebpf.New(n.cfg)
	defer p.Close()
	res, err := p.Ensure()
	require.NoError(t, err)
	n.programs.Store(p)
	require.Len(t, res.Notes, 1)
	assert.Contains(t, res.Notes[0], "before the agent's connect4")
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	assert.Equal(t, refused, a.ask("blocking"))
	require.NoError(t, other.Close())
	res, err = p.Ensure()
	require.NoError(t, err)
	assert.Empty(t, res.Notes)
	assert.Equal(t, uidA, a.ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

func TestRefusals(t *testing.T) {
	n := newNode(t)
	fails := func(change func(*ebpf.Config), text string) {
		t.Helper()
		cfg := n.cfg
		change(&cfg)
		p := ebpf.New(cfg)
		defer p.Close()
		_, err := p.Ensure()
		require.ErrorContains(t, err, text)
	}
	fails(func(c *ebpf.Config) { c.CgroupRoot = t.TempDir() }, "does not use cgroup v2")
	fails(func(c *ebpf.Config) { c.CgroupRoot = "/nowhere" }, "set --cgroup-root")
	fails(func(c *ebpf.Config) { c.Pins = t.TempDir() }, "mount -t bpf bpf")
	empty := filepath.Join(n.tree, "empty")
	require.NoError(t, os.MkdirAll(empty, 0o755))
	fails(func(c *ebpf.Config) { c.CgroupRoot = empty }, "is not in "+empty)
	n.enter("system.slice")
	fails(func(*ebpf.Config) {}, "works only in a pod")
	assert.NoDirExists(t, n.cfg.Pins)
}

// The agent needs two capabilities, and says so.
func TestCapabilities(t *testing.T) {
	n := newNode(t)
	n.agent()
	require.ErrorContains(t, n.ensureWith(unix.CAP_NET_ADMIN), "missing: BPF")
	require.ErrorContains(t, n.ensureWith(unix.CAP_BPF), "missing: NET_ADMIN")
	require.NoError(t, n.ensureWith(unix.CAP_BPF, unix.CAP_NET_ADMIN))
	require.NoError(t, n.ensureWith(unix.CAP_BPF, unix.CAP_NET_ADMIN), "with the pinned ones")
	assert.Equal(t, uidA, n.addPod("10.244.0.7", guaranteedA, testbed.Routed).ask("blocking"))
	assert.Zero(t, n.leaks.Load())
}

// Whether the kernel takes the programs can be tried, and leaves nothing behind.
func TestTry(t *testing.T) {
	n := newNode(t)
	require.NoError(t, ebpf.Try(n.cfg))
	assert.NoDirExists(t, n.cfg.Pins)
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	assert.Equal(t, "imds", a.ask("blocking"), "nothing is attached")
	n.agent()
	n.ensure()
	require.NoError(t, ebpf.Try(n.cfg))
	assert.Equal(t, uidA, a.ask("blocking"), "the agent's are as they were")
	n.enter("system.slice")
	assert.ErrorIs(t, ebpf.Try(n.cfg), ebpf.ErrNotInPod)
}

func TestAbove(t *testing.T) {
	n := newNode(t)
	require.NoError(t, ebpf.Possible(n.cfg))
	above, err := ebpf.Above(n.cfg.CgroupRoot)
	require.NoError(t, err)
	require.Empty(t, above)
	n.ensure() // which is not above
	above, err = ebpf.Above(n.cfg.CgroupRoot)
	require.NoError(t, err)
	require.Empty(t, above)
	dir, err := os.Open(n.tree)
	require.NoError(t, err)
	defer dir.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: rewriter(t), Attach: cilium.AttachCGroupInet4Connect})
	require.NoError(t, err)
	defer l.Close()
	above, err = ebpf.Above(n.cfg.CgroupRoot)
	require.NoError(t, err)
	assert.Equal(t, n.tree, above)
	require.NoError(t, ebpf.InPlace(n.cfg.Pins))
	require.NoError(t, os.Remove(filepath.Join(n.cfg.Pins, "links", "connect6")))
	assert.ErrorContains(t, ebpf.InPlace(n.cfg.Pins), "connect6 is not attached")
	n.cfg.CgroupRoot = t.TempDir()
	assert.Error(t, ebpf.Possible(n.cfg))
}
