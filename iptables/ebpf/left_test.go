package ebpf_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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
