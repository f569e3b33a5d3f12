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

const bootGuardUnit = "nmi-boot-guard.service"

// The agent keeps the unit of the boot guard, for its own metadata address, and nmi cleanup
// removes it with the rules.
func TestBootGuard(t *testing.T) {
	s := begin(t)
	dir := t.TempDir()
	wants := filepath.Join(dir, "multi-user.target.wants")
	require.NoError(t, os.Mkdir(wants, 0o755))
	before := s.command("ip", "-4", "rule", "list")
	a := s.agent("--boot-guard-dir=" + dir)
	unit := func() string {
		content, _ := os.ReadFile(filepath.Join(wants, bootGuardUnit))
		return string(content)
	}
	require.Eventually(t, func() bool { return unit() != "" }, patience, time.Millisecond)
	assert.Contains(t, unit(), "ExecStart=-ip -4 rule add pref 11 to 169.254.169.254/32 prohibit protocol kernel\n")
	_, page := a.Ready(t.Context())
	assert.NotContains(t, page, "boot guard")
	code, err := a.Stop()
	require.NoError(t, err)
	assert.Zero(t, code)
	assert.NotEmpty(t, unit(), "it stays")

	code, output := s.nmi("cleanup")
	assert.Zero(t, code, output)
	assert.NotEmpty(t, unit(), "cleanup does not know where it is")
	code, output = s.nmi("cleanup", "--boot-guard-dir="+dir)
	assert.Zero(t, code, output)
	assert.Contains(t, output, "boot guard removed")
	names, err := filepath.Glob(dir + "/*/*")
	require.NoError(t, err)
	assert.Empty(t, names)
	assert.NoFileExists(t, filepath.Join(dir, bootGuardUnit))
	assert.Equal(t, before, s.command("ip", "-4", "rule", "list"))
}

// Where the node does not allow it, the agent runs without, is ready, and says so.
func TestWithoutABootGuardItRunsAndSaysSo(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	dir := t.TempDir() // no systemd has units here
	a := s.agent("--boot-guard-dir=" + dir)
	require.Eventually(t, func() bool {
		status, page := a.Ready(t.Context())
		return status == http.StatusOK && strings.Contains(page, "no boot guard on this node") && strings.Contains(page, "mount the node's /etc/systemd/system at "+dir)
	}, patience, 10*time.Millisecond)
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
	assert.Equal(t, 1, strings.Count(a.Log(), "the boot guard cannot be kept on this node"))
}
