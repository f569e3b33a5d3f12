package main

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/bootguard"
)

func TestRemoveBootGuard(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	missing, usual, given := filepath.Join(t.TempDir(), "missing"), t.TempDir(), t.TempDir()
	before := bootguard.Dirs
	t.Cleanup(func() { bootguard.Dirs = before })
	bootguard.Dirs = []string{missing, usual}
	write := func(dir string) (unit string) {
		unit = filepath.Join(dir, bootguard.Unit)
		require.NoError(t, os.WriteFile(unit, []byte("# Written by nmi (--boot-guard-dir), once\n"), 0o644))
		return unit
	}
	a, b := write(usual), write(given)
	require.NoError(t, removeBootGuard(t.Context(), &config{}, log))
	assert.NoFileExists(t, a)
	assert.FileExists(t, b)
	require.NoError(t, removeBootGuard(t.Context(), &config{bootGuardDir: given}, log))
	assert.NoFileExists(t, b)
	require.ErrorIs(t, removeBootGuard(t.Context(), &config{bootGuardDir: missing}, log), fs.ErrNotExist, "it was asked for")
}
