package bootguard

import (
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testlog"
)

// newDir returns a directory of units, as systemctl enable of any service leaves it.
func newDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, wants), 0o755))
	return dir
}

// files lists all below a directory: contents of files and targets of symlinks, by name.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, path)
		switch {
		case err != nil || entry.IsDir():
			return err
		case entry.Type() == fs.ModeSymlink:
			found[name], err = os.Readlink(path)
		default:
			var content []byte
			content, err = os.ReadFile(path)
			found[name] = string(content)
		}
		return err
	}))
	return found
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func TestInstallAndRemove(t *testing.T) {
	dir := newDir(t)
	content := unitFile([]string{"ip one", "ip two"})
	before := syscall.Umask(0o077)
	defer syscall.Umask(before)
	written, err := install(dir, content)
	require.NoError(t, err)
	assert.True(t, written)
	assert.Equal(t, map[string]string{Unit: content, linkName: linkTo}, files(t, dir), "two names, and no other")
	info, err := os.Stat(filepath.Join(dir, linkName))
	require.NoError(t, err, "the symlink leads to the unit")
	assert.Equal(t, fs.FileMode(0o644), info.Mode())

	written, err = install(dir, content)
	require.NoError(t, err)
	assert.False(t, written, "nothing to do")

	newer := unitFile([]string{"ip three"})
	write(t, filepath.Join(dir, tempName), "of an agent that was killed")
	written, err = install(dir, newer)
	require.NoError(t, err)
	assert.True(t, written)
	assert.Equal(t, map[string]string{Unit: newer, linkName: linkTo}, files(t, dir))

	for name, change := range map[string]func() error{
		"unit removed":    func() error { return os.Remove(filepath.Join(dir, Unit)) },
		"unit disabled":   func() error { return os.Remove(filepath.Join(dir, linkName)) },
		"unit edited":     func() error { return os.WriteFile(filepath.Join(dir, Unit), []byte(marker), 0o644) },
		"unit's end lost": func() error { return os.Truncate(filepath.Join(dir, Unit), int64(len(marker))) },
	} {
		require.NoError(t, change(), name)
		written, err = install(dir, newer)
		require.NoError(t, err, name)
		assert.True(t, written, name)
		assert.Equal(t, map[string]string{Unit: newer, linkName: linkTo}, files(t, dir), name)
	}

	require.NoError(t, os.WriteFile(filepath.Join(dir, tempName), nil, 0o644)) // as an agent that is killed may leave it
	for _, want := range []bool{true, false} {
		removed, err := Remove(dir)
		require.NoError(t, err)
		assert.Equal(t, want, removed)
		assert.Empty(t, files(t, dir))
	}
	_, err = Remove(dir + "-not-mounted")
	require.ErrorContains(t, err, "mount the node's /etc/systemd/system at ")
}

// The symlink of systemctl enable is as good as the agent's.
func TestEnabledBySystemctl(t *testing.T) {
	dir := newDir(t)
	require.NoError(t, os.Symlink("/etc/systemd/system/"+Unit, filepath.Join(dir, linkName)))
	content := unitFile(nil)
	_, err := install(dir, content)
	require.NoError(t, err)
	written, err := install(dir, content)
	require.NoError(t, err)
	assert.False(t, written)
	removed, err := Remove(dir)
	require.NoError(t, err)
	assert.True(t, removed)
	assert.Empty(t, files(t, dir))
}

// What the agent has not written stays as it is, inside the directory and outside of it.
func TestForeignFiles(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(dir, outside string) error
		says    string
	}{
		"a unit of that name": {func(dir, _ string) error {
			return os.WriteFile(filepath.Join(dir, Unit), []byte("[Service]\nExecStart=/bin/true\n"), 0o644)
		}, "another program's"},
		"an enabled unit of that name": {func(dir, _ string) error {
			if err := os.Symlink(linkTo, filepath.Join(dir, linkName)); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, Unit), nil, 0o644)
		}, "another program's"},
		"masked": {func(dir, _ string) error { return os.Symlink("/dev/null", filepath.Join(dir, Unit)) }, "not a regular file"},
		"a symlink to a file": {func(dir, outside string) error {
			return os.Symlink(filepath.Join(outside, "file"), filepath.Join(dir, Unit))
		}, "not a regular file"},
		"a directory": {func(dir, _ string) error { return os.Mkdir(filepath.Join(dir, Unit), 0o755) }, "not a regular file"},
		"a fifo":      {func(dir, _ string) error { return syscall.Mkfifo(filepath.Join(dir, Unit), 0o644) }, "not a regular file"},
		"a symlink in place of the directory of wants": {func(dir, outside string) error {
			if err := os.Remove(filepath.Join(dir, wants)); err != nil {
				return err
			}
			return os.Symlink(outside, filepath.Join(dir, wants))
		}, "escapes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, outside := newDir(t), t.TempDir()
			write(t, filepath.Join(outside, "file"), marker+", as if")
			require.NoError(t, tc.prepare(dir, outside))
			before := listing(t, dir)
			_, err := install(dir, unitFile(nil))
			require.ErrorContains(t, err, tc.says)
			removed, _ := Remove(dir)
			assert.False(t, removed)
			assert.Equal(t, before, listing(t, dir))
			assert.Equal(t, map[string]string{"file": marker + ", as if"}, files(t, outside))
		})
	}
}

// A foreign symlink alone does not keep the agent from writing the unit, which that may
// be for, but is reported, and stays.
func TestForeignSymlink(t *testing.T) {
	dir, outside := newDir(t), t.TempDir()
	link := filepath.Join(dir, linkName)
	write(t, filepath.Join(outside, "file"), "theirs")
	require.NoError(t, os.Symlink(filepath.Join(outside, "file"), link))
	_, err := install(dir, unitFile(nil))
	require.ErrorContains(t, err, "not a symlink to "+Unit)
	_, err = Remove(dir)
	require.NoError(t, err)
	assert.Equal(t, map[string]string{linkName: filepath.Join(outside, "file")}, files(t, dir))
	assert.Equal(t, map[string]string{"file": "theirs"}, files(t, outside))
}

// listing is the names, types and sizes of all below a directory.
func listing(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "find", dir, "-printf", "%P %y %s %l\n").CombinedOutput()
	require.NoError(t, err, string(out))
	return string(out)
}

// A temporary file that leads elsewhere is replaced, not followed.
func TestSymlinkForTheTemporaryFile(t *testing.T) {
	dir, outside := newDir(t), t.TempDir()
	require.NoError(t, os.Symlink(filepath.Join(outside, "file"), filepath.Join(dir, tempName)))
	_, err := install(dir, unitFile(nil))
	require.NoError(t, err)
	assert.Empty(t, files(t, outside))
	assert.Equal(t, map[string]string{Unit: unitFile(nil), linkName: linkTo}, files(t, dir))
}

// The node forbids it: the error is logged once, Status says it, and Run goes on and
// succeeds when it can.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir() // without the directory of wants: not systemd's
		var log testlog.Buffer
		g := New(Config{Dir: dir, Commands: []string{"ip one"}, Interval: time.Minute, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		assert.Empty(t, g.Status())
		stopped := make(chan struct{})
		go func() { defer close(stopped); g.Run(t.Context()) }()
		time.Sleep(5*time.Minute + time.Second)
		assert.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
		assert.Contains(t, g.Status(), "mount the node's /etc/systemd/system at "+dir)
		assert.NotContains(t, g.Status(), "\n")
		assert.Empty(t, files(t, dir))

		require.NoError(t, os.Mkdir(filepath.Join(dir, wants), 0o755))
		time.Sleep(time.Minute)
		assert.Empty(t, g.Status())
		assert.Len(t, files(t, dir), 2)
		time.Sleep(5 * time.Minute)
		assert.Equal(t, 1, strings.Count(log.String(), "boot guard written"), log.String())

		require.NoError(t, os.Remove(filepath.Join(dir, Unit)))
		time.Sleep(time.Minute)
		assert.Len(t, files(t, dir), 2, "put back")
	})
}

func TestForbidden(t *testing.T) {
	dir := newDir(t)
	require.NoError(t, withoutRights(func() {
		_, err := install(dir, unitFile(nil))
		assert.ErrorIs(t, err, syscall.EACCES)
		assert.ErrorContains(t, err, "the node forbids writing to "+dir)
	}))
	assert.Empty(t, files(t, dir))
}

func TestReadOnly(t *testing.T) {
	dir := newDir(t)
	require.NoError(t, readOnly(dir, func() {
		_, err := install(dir, unitFile(nil))
		assert.ErrorIs(t, err, syscall.EROFS)
		assert.ErrorContains(t, err, "the node's /etc is immutable")
		removed, err := Remove(dir)
		assert.NoError(t, err, "nothing to remove")
		assert.False(t, removed)
	}))
	_, err := install(dir, unitFile(nil))
	require.NoError(t, err)
	require.NoError(t, readOnly(dir, func() {
		written, err := install(dir, unitFile(nil))
		assert.NoError(t, err, "it is there already")
		assert.False(t, written)
		_, err = Remove(dir)
		assert.ErrorIs(t, err, syscall.EROFS)
	}))
}

// What docs/boot-guard.md promises of the unit, and systemd alone could show: it comes before
// the network and the kubelet, waits for nothing, holds up a boot for a short time only, and
// nothing requires it.
func TestOrder(t *testing.T) {
	settings := make(map[string][]string)
	for line := range strings.Lines(unitFile([]string{"ip one", "ip two"})) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			settings[name] = append(settings[name], value)
		}
	}
	delete(settings, "Description")
	delete(settings, "Documentation")
	assert.Equal(t, map[string][]string{
		"Before": {"network-pre.target kubelet.service"}, "Wants": {"network-pre.target"}, "DefaultDependencies": {"no"},
		"Type": {"oneshot"}, "RemainAfterExit": {"yes"}, "TimeoutStartSec": {"10s"}, "ExecStart": {"-ip one", "-ip two"},
		"WantedBy": {"multi-user.target"},
	}, settings)
}

// systemd accepts the unit, without a warning, and finds no ordering cycle in a boot with
// it, on a node whose early services wait for the network as cloud-init's do.
func TestSystemdVerifies(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	require.NoError(t, err, "install systemd, which make packages does")
	dir := newDir(t)
	_, err = install(dir, unitFile([]string{"ip -4 rule add pref 12 nop protocol kernel"}))
	require.NoError(t, err)
	for name, order := range map[string]string{
		"kubelet.service": "",
		"early.service":   "[Unit]\nDefaultDependencies=no\nAfter=network-pre.target\nBefore=sysinit.target\n",
	} {
		write(t, filepath.Join(dir, name), order+"[Service]\nExecStart=/bin/true\n")
		require.NoError(t, os.Symlink("../"+name, filepath.Join(dir, wants, name)))
	}
	for _, start := range []string{Unit, "multi-user.target"} {
		cmd := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", start)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":") // and the usual directories
		out, err := cmd.CombinedOutput()
		assert.NoError(t, err, string(out))
		assert.NotContains(t, string(out), "cycle")
		assert.NotContains(t, string(out), Unit)
	}
}
