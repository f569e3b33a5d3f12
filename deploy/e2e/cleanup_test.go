//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/handover"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestCleanupGivesTheNodeBack(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent("--redirect-mode=dnat")
	require.Equal(t, 200, p.asks(vault).status)
	_, err := a.Stop()
	require.NoError(t, err)
	for range 2 {
		code, output := s.nmi("cleanup")
		assert.Zero(t, code, output)
	}
	assert.NotContains(t, s.nat(), "aad-metadata")
	assert.NotContains(t, s.command("iptables-save"), "nmi-")
	assert.NotContains(t, s.command("ip", "rule", "list"), "169.254.169.254")
	assert.Equal(t, imdstest.Node, p.asks(vault).subject, "as on a node without the agent")
	world.IMDS.Reset() // that was no leak
}

// Whatever the flags of the agents were, cleanup finds what they left without being told.
func TestCleanupFindsWhatOtherFlagsLeft(t *testing.T) {
	s := begin(t)
	state := func() string {
		return s.command("iptables-nft-save") + s.command("iptables-legacy-save") + s.command("ip", "-4", "rule", "list") + s.command("ip", "-4", "addr", "show", "dev", "lo")
	}
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	for _, backend := range []string{"nft", "legacy"} {
		for _, address := range []string{"169.254.169.250", "169.254.169.251"} {
			a := s.agent("--redirect-mode=dnat", "--redirect-address="+address, "--iptables-backend="+backend, "--nmi-port=2580", "--block-wireserver")
			require.Equal(t, 200, p.asks(vault).status)
			require.Contains(t, state(), address+":2580")
			s.stops(a)
		}
	}
	s.stops(s.agent("--redirect-mode=none", "--metadata-ip=169.254.169.253", "--handover-dir="+t.TempDir()))
	left := state()
	for _, own := range []string{"nmi-guard", "169.254.169.250/32", "169.254.169.251/32"} {
		require.Contains(t, left, own)
	}
	// As an agent of before the label would have left it.
	s.command("ip", "addr", "del", "169.254.169.251/32", "dev", "lo")
	s.command("ip", "addr", "add", "169.254.169.251/32", "dev", "lo", "scope", "host")
	s.command("ip", "addr", "add", "169.254.169.240/32", "dev", "lo") // not the agent's
	code, output := s.nmi("cleanup", "--redirect-address=169.254.169.251")
	assert.Zero(t, code, output)
	assert.Contains(t, state(), "169.254.169.240/32")
	s.command("ip", "addr", "del", "169.254.169.240/32", "dev", "lo")
	for _, own := range []string{"nmi-", "aad-metadata", "169.254.169.25", "168.63.129.16"} {
		assert.NotContains(t, state(), own)
	}
}

// Cleanup waits for the end of an agent that runs, and takes nothing from it meanwhile.
func TestCleanupBesideAnAgentThatRuns(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	require.Equal(t, http.StatusOK, p.asks(vault).status)
	state := func() string {
		return s.command("iptables", "-t", "nat", "-S") + s.command("iptables", "-t", "mangle", "-S") + s.command("ip", "-4", "rule", "list")
	}
	before := state()
	binary, err := testbed.AgentBinary()
	require.NoError(t, err)
	start := func() *testbed.Program {
		cleanup, err := testbed.StartProgram(binary, nil, "cleanup", "--handover-dir="+testbed.HandoverDir(world.Kubeconfig))
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			open, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cleanup.PID()))
			return slices.ContainsFunc(open, func(fd string) bool {
				path, _ := os.Readlink(fd)
				return strings.HasSuffix(path, "/owner.lock")
			})
		}, patience, time.Millisecond, "it waits for the lock")
		return cleanup
	}
	cleanup := start()
	code, err := cleanup.Stop()
	require.NoError(t, err)
	assert.Equal(t, 1, code)
	assert.Contains(t, cleanup.Log(), "an agent that runs would write the rules again, uninstall it first")
	assert.Equal(t, before, state())

	cleanup = start()
	s.stops(a)
	code, err = cleanup.Wait(patience)
	require.NoError(t, err)
	assert.Zero(t, code, cleanup.Log())
	assert.NotContains(t, state(), "169.254.169.254")
}

// An agent that starts while cleanup runs finds the node locked, and leaves nothing.
func TestCleanupBesideAnAgentThatStarts(t *testing.T) {
	s := begin(t)
	dir := testbed.HandoverDir(world.Kubeconfig)
	require.NoError(t, os.MkdirAll(dir, 0o700))
	unlock, err := handover.Lock(t.Context(), dir, patience) // as cleanup does
	require.NoError(t, err)
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig},
		"--node=node1", "--operation-mode=managed", "--http-probe-port=8085", "--handover-dir="+dir)
	unlock()
	require.NoError(t, err)
	assert.Equal(t, 1, code)
	assert.Contains(t, lastLine(output), "another agent runs on this node")
	assert.NotContains(t, s.command("iptables-save"), "nmi-")
	assert.NotContains(t, s.command("ip", "-4", "rule", "list"), "169.254.169.254")
}
