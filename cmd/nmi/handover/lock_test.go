package handover

import (
	"os"
	"testing"

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
