package testbed

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { Main(m.Run) }

func TestMemoryLimit(t *testing.T) {
	m, env, err := NewManifestMemoryLimit()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Close()) })
	assert.Equal(t, []string{"GOMEMLIMIT=110MiB"}, env)
	run := func(block string) int {
		t.Helper()
		command := append(m.launcher(), "dd", "if=/dev/zero", "of=/dev/null", "bs="+block, "count=1")
		p, err := StartProgram(command[0], nil, command[1:]...)
		require.NoError(t, err)
		code, err := p.Wait(30 * time.Second)
		require.NoError(t, err)
		return code
	}
	check := func(kills, least, most int64) {
		t.Helper()
		n, err := m.OOMKills()
		require.NoError(t, err)
		assert.Equal(t, kills, n)
		peak, err := m.Peak()
		require.NoError(t, err)
		assert.GreaterOrEqual(t, peak, least)
		assert.LessOrEqual(t, peak, most)
	}
	assert.Zero(t, run("64M"))
	check(0, 64<<20, 80<<20)
	assert.Equal(t, -1, run("192M"), "killed")
	check(1, 150<<20, 160<<20)
}
