package main

import (
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestTheLockIsHeldUntilTheLastCopyOfItsFileIsClosed(t *testing.T) {
	dir := t.TempDir() + "/nmi"
	first, err := lock(t.Context(), dir)
	require.NoError(t, err)
	fd, err := unix.Dup(int(first.Fd())) // as a successor is given it
	require.NoError(t, err)
	successors := os.NewFile(uintptr(fd), "copy")
	require.NoError(t, first.Close())
	_, err = lock(t.Context(), dir)
	require.ErrorIs(t, err, errOwned)
	assert.ErrorContains(t, err, dir)
	assert.NotContains(t, err.Error(), "\n")
	require.NoError(t, successors.Close())
	third, err := lock(t.Context(), dir)
	require.NoError(t, err)
	require.NoError(t, third.Close())
}
