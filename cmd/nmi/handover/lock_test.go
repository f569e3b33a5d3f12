package handover

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestLockLastsUntilAllCopiesAreClosed(t *testing.T) {
	dir := t.TempDir() + "/nmi"
	first, err := lockNode(t.Context(), dir)
	require.NoError(t, err)
	fd, err := unix.Dup(int(first.Fd())) // as a new agent is given it
	require.NoError(t, err)
	copied := os.NewFile(uintptr(fd), "copy")
	require.NoError(t, first.Close())
	_, err = lockNode(t.Context(), dir)
	require.ErrorIs(t, err, errLocked)
	assert.ErrorContains(t, err, dir)
	assert.NotContains(t, err.Error(), "\n")
	require.NoError(t, copied.Close())
	third, err := lockNode(t.Context(), dir)
	require.NoError(t, err)
	require.NoError(t, third.Close())
}

// TestLockWaitsForAnAgent and no longer than it is told to.
func TestLockWaitsForAnAgent(t *testing.T) {
	dir := t.TempDir()
	unlock, err := Lock(t.Context(), dir, 0)
	require.NoError(t, err, "no agent has run")
	_, err = lockNode(t.Context(), dir)
	require.ErrorIs(t, err, errLocked, "one that starts meanwhile is kept out")
	unlock()
	for _, nothing := range []string{"", filepath.Join(dir, "missing")} {
		unlock, err := Lock(t.Context(), nothing, 0)
		require.NoError(t, err, "%q", nothing)
		unlock()
		require.NoFileExists(t, filepath.Join(nothing, lockFile))
	}
	agent, err := lockNode(t.Context(), dir)
	require.NoError(t, err)
	_, err = Lock(t.Context(), dir, 3*lockPoll)
	require.ErrorIs(t, err, errLocked)
	locked := make(chan error, 1)
	go func() {
		var err error
		unlock, err = Lock(t.Context(), dir, 30*time.Second)
		locked <- err
	}()
	select {
	case <-locked:
		require.Fail(t, "beside an agent")
	case <-time.After(3 * lockPoll):
	}
	require.NoError(t, agent.Close())
	require.NoError(t, <-locked)
	_, err = lockNode(t.Context(), dir)
	require.ErrorIs(t, err, errLocked, "an agent beside it")
	unlock()
	agent, err = lockNode(t.Context(), dir)
	require.NoError(t, err)
	require.NoError(t, agent.Close())
}
