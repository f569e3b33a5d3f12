//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testbed/attack"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// A pod that may send raw packets tries to get the node's token, while it and others
// are given their own.
func TestForgedPacketsGetNoTokenOfTheNode(t *testing.T) {
	s := begin(t)
	attacker := s.pod("attacker-0", "10.244.0.11", testbed.Ptp, "none")
	good := s.pod("cart-0", "10.244.0.12", testbed.Routed, "cart")
	path := strings.TrimPrefix(tokenURL, "http://"+testbed.MetadataAddress) + vault
	port := uint16(20000)
	attacks := func(first attack.FirstPacket) (subjects []string) {
		var ports []uint16
		for range 4 {
			port++
			ports = append(ports, port)
		}
		results, err := attacker.Attack(t.Context(), attack.Config{First: first, Ports: ports, Patience: 1400 * time.Millisecond, Path: path})
		require.NoError(t, err)
		for _, r := range results {
			var in struct {
				Token string `json:"access_token"`
			}
			if json.Unmarshal([]byte(r.Answer), &in) == nil && in.Token != "" {
				subjects = append(subjects, imdstest.Subject(in.Token))
			}
		}
		return subjects
	}

	// On a node with the redirect of an agent from before, it works.
	s.command("iptables", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80", "-j", "REDIRECT", "--to-ports", "2579")
	for _, first := range []attack.FirstPacket{attack.ACK, attack.SYN} {
		assert.Contains(t, attacks(first), imdstest.Node, "without fences, %s", first)
	}
	s.command("iptables", "-t", "nat", "-D", "PREROUTING", "1")
	world.IMDS.Reset() // these were leaks, and meant to be

	s.agent("--redirect-mode=dnat")
	for _, first := range []attack.FirstPacket{attack.ACK, attack.SYN} {
		for range 2 {
			assert.Empty(t, attacks(first), first)
			assert.Equal(t, cart.ClientID, good.asks(vault).subject)
			assert.Equal(t, 400, attacker.asks(vault).status, "it is bound to nothing")
		}
	}
	assert.Empty(t, world.Leaks())
}

// The fences are there before the redirect, and both before the agent knows any pod.
func TestTheFencesComeFirst(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	require.NoError(t, world.StopAPIServer())
	// The redirect cannot be written; the fences can.
	path, refuse := stubbornIptables(t)
	refuse("aad-metadata")
	a := s.agentWithPath(path, "--iptables-backend=nft")
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == http.StatusServiceUnavailable && strings.Contains(text, "the redirect of pods' requests to the agent (chain aad-metadata, first in PREROUTING of the table nat) is not in place")
	}, patience, 10*time.Millisecond)
	assert.Contains(t, s.command("/usr/sbin/iptables-nft", "-t", "mangle", "-S"), "-A FORWARD -j nmi-guard")
	assert.Contains(t, s.command("ip", "rule", "list"), "to 169.254.169.254 prohibit")
	assert.Zero(t, p.probes().status, "refused; without the fences it would have the node's token")
	require.NoError(t, world.StartAPIServer(t.Context()))
}

// Whatever ends a start, but for bad flags and missing privileges, comes after the fences.
func TestAStartThatFailsLeavesTheNodeClosed(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	require.NotZero(t, p.probes().status, "nothing is in place before")
	world.IMDS.Reset() // that was a leak, and meant to be
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=/nowhere"}, "--node="+testbed.NodeName, "--handover-dir=")
	require.NoError(t, err)
	require.Equal(t, 1, code, output)
	assert.Contains(t, output, "KUBECONFIG=/nowhere")
	assert.Zero(t, p.probes().status, "refused")
	assert.Empty(t, world.Leaks())
}

func TestWithoutIptablesItRunsAndSaysSo(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agentWithPath("/nowhere")
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == http.StatusServiceUnavailable && strings.Contains(text, "install the iptables package")
	}, patience, 10*time.Millisecond)
	assert.Zero(t, p.probes().status, "the routing fence stands")
}

// agentWithPath starts the agent with another search path for commands.
func (s *scenario) agentWithPath(path string, flags ...string) *testbed.Agent {
	s.t.Helper()
	before := os.Getenv("PATH")
	require.NoError(s.t, os.Setenv("PATH", path))
	defer func() { require.NoError(s.t, os.Setenv("PATH", before)) }()
	return s.agentNotReady(flags...)
}

// stubbornIptables returns a search path in which iptables-nft-restore fails for any input with
// the last pattern, if it is not "".
func stubbornIptables(t *testing.T) (path string, refuse func(pattern string)) {
	t.Helper()
	bin := t.TempDir()
	restore, err := filepath.EvalSymlinks("/usr/sbin/iptables-nft-restore")
	require.NoError(t, err)
	refuse = func(pattern string) { require.NoError(t, os.WriteFile(bin+"/pattern", []byte(pattern), 0o600)) }
	refuse("")
	writeScript(t, bin+"/iptables-nft-restore", fmt.Sprintf(`input=$(cat); pattern=$(cat %s/pattern)
[[ -n $pattern && $input == *"$pattern"* ]] && { echo no >&2; exit 4; }
printf '%%s\n' "$input" | exec -a iptables-nft-restore %s "$@"`, bin, restore))
	writeScript(t, bin+"/iptables-nft", `exec /usr/sbin/iptables-nft "$@"`)
	return bin + ":/usr/sbin:/usr/bin:/sbin:/bin", refuse
}

func writeScript(t *testing.T, path, script string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/bash\n"+script+"\n"), 0o755))
}
