//go:build e2e

package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Mode auto takes programs where the node forbids rules, and says so.
func TestEBPFByAuto(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent("--redirect-mode=auto")
	_, text := a.Ready(t.Context())
	assert.NotContains(t, text, "ebpf", "rules can be written")
	s.stops(a)
	k.cleanup()
	flags := []string{"--redirect-mode=auto", "--iptables-backend=nft", "--cgroup-root=" + k.CgroupRoot}
	before := func() diagnosis { return s.diagnose(world.Kubeconfig, k.launcher(), append(flags, "--pre")...) }
	assert.Empty(t, before().about("programs"))
	k.forbidRules()
	d := before()
	s.finds(d, "programs", "success", "")
	assert.Contains(t, d.about("programs")[0].Description, "--redirect-mode=auto chooses them here, since iptables rules cannot be written")
	s.finds(d, "writable", "warning", "the fences of --redirect-mode=ebpf that are rules cannot be written")
	a = k.agent(flags...)
	_, text = a.Ready(t.Context())
	assert.Contains(t, text, "redirect mode ebpf: iptables rules cannot be written")
	_, text = page(&http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}, "127.0.0.1", metricsPort, "/metrics")
	assert.Contains(t, text, `nmi_rules_in_place{component="egress"} 1`)
	assert.Contains(t, text, `nmi_rules_in_place{component="redirect"} 1`)
	assert.NotContains(t, text, `nmi_rules_in_place{component="guard"}`, "no alert for what the mode does without")
	n := s.network("10.244.0.11", testbed.Routed)
	assert.Equal(t, cart.ClientID, k.pod("cart-0", "10.244.0.11", n, binding("cart")).asks().subject)
}

// With the manifest of rules alone it cannot, and names what would let it.
func TestEBPFByAutoWithoutMeans(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	k.forbidRules()
	k.rules = true
	a := k.starts("--redirect-mode=auto", "--iptables-backend=nft")
	var text string
	require.Eventually(t, func() bool {
		_, text = a.Ready(t.Context())
		return strings.Contains(text, "set the chart's value nmi.redirectMode=auto")
	}, patience, 50*time.Millisecond, "%s", &text)
	assert.Contains(t, text, "(missing: BPF)")
	s.stops(a)
}

// forbidRules has the commands of agents that start from now on answer as those of a node that forbids rules.
func (k *kubepods) forbidRules() {
	k.t.Helper()
	refusing := k.t.TempDir()
	for _, name := range []string{"iptables-nft", "iptables-nft-restore"} {
		script := `#!/bin/sh
[ "$1" = --version ] && echo "iptables v1.8.9 (nf_tables)" && exit
echo 'iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)' >&2
exit 4
`
		require.NoError(k.t, os.WriteFile(filepath.Join(refusing, name), []byte(script), 0o755))
	}
	k.env = []string{"PATH=" + refusing + ":/usr/bin:/bin"}
}

// An agent in another mode takes over, both ways, and leaves nothing of the other mode behind.
func TestEBPFModeChange(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	rules := func() string { return s.command("iptables-save") }
	n := s.network("10.244.0.11", testbed.Routed)
	a := k.agent("--redirect-mode=dnat")
	p := k.pod("changed-0", "10.244.0.11", n, binding("cart"))
	require.Equal(t, cart.ClientID, p.asks().subject)
	require.Contains(t, rules(), "aad-metadata")
	asked, failed, stop := k.asking(4)
	defer stop()
	for _, mode := range []string{"ebpf", "dnat", "ebpf"} {
		asked.Store(0)
		failed.Store(0)
		next := k.starts("--redirect-mode=" + mode)
		s.says(next, "listening")
		require.NoError(t, next.AwaitReady(t.Context()))
		s.stops(a)
		a = next
		require.Eventually(t, func() bool {
			now := rules()
			return strings.Contains(now, "aad-metadata") == (mode == "dnat") && strings.Contains(now, "nmi-input") == (mode == "dnat")
		}, patience, 50*time.Millisecond, mode)
		require.Eventually(t, func() bool { return p.asks().subject == cart.ClientID }, patience, 50*time.Millisecond, mode)
		t.Logf("to mode %s: %d requests, %d of them failed", mode, asked.Load(), failed.Load())
	}
}

// Without the BPF file system an agent in another mode cannot remove programs, but notices them.
func TestEBPFLeftPrograms(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	p := k.pod("cart-0", "10.244.0.11", s.network("10.244.0.11", testbed.Routed), binding("cart"))
	s.stops(k.agent())
	k.rules = true
	a := k.starts("--redirect-mode=dnat")
	var text string
	require.Eventually(t, func() bool {
		_, text = a.Ready(t.Context())
		return strings.Contains(text, "programs that an agent in mode ebpf has left")
	}, patience, 50*time.Millisecond, "%s", &text)
	s.stops(a)
	k.cleanup()
	k.agent("--redirect-mode=dnat")
	assert.Equal(t, cart.ClientID, p.asks().subject)
}
