package ebpf_test

import (
	"log/slog"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
)

// An agent in another mode, which may not see programs, notices those that were left.
func TestLeftPrograms(t *testing.T) {
	n := newNode(t)
	cfg := iptables.Config{Metadata: metadata, Port: target.Port(), Programs: ebpf.Config{Pins: "/nowhere"}}
	n.agent()
	require.NoError(t, iptables.LeftPrograms(cfg))
	n.ensure()
	require.NoError(t, iptables.LeftPrograms(cfg), "its own cgroup is exempt")
	n.enter("kubepods/podnext/agent")
	unmounted := iptables.Config{Address: target.Addr(), Programs: ebpf.Config{Pins: "/nowhere/nmi"}}
	require.ErrorContains(t, iptables.Cleanup(t.Context(), unmounted), "programs of mode ebpf are left, for the kernel forbids this process to send to 169.254.169.254: mount the node's BPF file system at /host/sys/fs/bpf or /sys/fs/bpf,")
	assert.ErrorContains(t, iptables.LeftPrograms(cfg), "the kernel forbids this process to send to 169.254.169.254")
	cfg.Programs.Pins = n.cfg.Pins
	assert.ErrorContains(t, iptables.LeftPrograms(cfg), "they are pinned in "+n.cfg.Pins)
	_, err := ebpf.Cleanup(n.cfg.Pins)
	require.NoError(t, err)
	require.NoError(t, iptables.LeftPrograms(cfg))
	assert.NoError(t, iptables.Cleanup(t.Context(), unmounted))
}

// Programs are removed from a container without BPF, too: its seccomp profile then forbids bpf().
func TestCleanupWithoutBPF(t *testing.T) {
	n := newNode(t)
	n.agent()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	cleanup := func() error {
		return with([]int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}, func() error {
			if err := forbidBPF(); err != nil {
				return err
			}
			return iptables.Cleanup(t.Context(), iptables.Config{Address: target.Addr(), Programs: n.cfg, Logger: slog.New(slog.DiscardHandler)})
		})
	}
	ensure := func() {
		n.enter(ownCgroup)
		n.ensure()
		n.enter("kubepods/podnext/cleanup")
	}
	ensure()
	require.Equal(t, uidA, a.ask("blocking"))
	require.NoError(t, cleanup())
	assert.NoDirExists(t, n.cfg.Pins)
	assert.Equal(t, "imds", a.ask("blocking"))

	ensure()
	held, err := link.LoadPinnedLink(filepath.Join(n.cfg.Pins, "links", ebpf.Egress), nil)
	require.NoError(t, err)
	require.ErrorContains(t, cleanup(), "another process holds the programs of mode ebpf")
	require.NoError(t, held.Close())
	assert.Eventually(t, func() bool { return a.ask("blocking") == "imds" }, patience, aMoment)
}

// forbidBPF does to this thread what a container's default seccomp profile does.
func forbidBPF() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}
