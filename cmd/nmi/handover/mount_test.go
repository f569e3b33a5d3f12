package handover

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testlog"
)

// inContainer runs fn with a root file system of its own, which has a directory /run and
// a mount, /mounted, as a container with a hostPath has.
func inContainer(t *testing.T, fn func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	root := t.TempDir()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread and its namespace end with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
				return err
			}
			err := errors.Join(
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("tmpfs", root, "tmpfs", 0, ""),
				os.Mkdir(filepath.Join(root, "run"), 0o755),
				os.Mkdir(filepath.Join(root, "mounted"), 0o755),
				unix.Mount("tmpfs", filepath.Join(root, "mounted"), "tmpfs", 0, ""),
				os.Symlink("/mounted", filepath.Join(root, "link")),
				unix.Chroot(root), unix.Chdir("/"),
			)
			if err == nil {
				fn()
			}
			return err
		}()
	}()
	require.NoError(t, <-done)
}

func TestDirectoryOfTheContainer(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
	inContainer(t, func() {
		for dir, want := range map[string]bool{
			"/run": true, "/run/nmi": true, "/new/a/b": true,
			"/mounted": false, "/mounted/nmi": false, "/mounted/a/b": false, "/link/nmi": false,
			"/run/\x00": false, // an error, which other places report
		} {
			assert.Equal(t, want, inContainerFS(dir), dir)
		}
		var log testlog.Buffer
		h := New("/run/nmi", log.Logger())
		assert.Contains(t, h.Status(), "no agent can take over from this one: --handover-dir is in the file system of this container")
		assert.Contains(t, log.String(), "hostPath")
		log = testlog.Buffer{}
		h = New("/mounted/nmi", log.Logger())
		assert.Empty(t, h.Status())
		assert.Empty(t, log.String())
	})
}

func TestDirectoryOfTheContainerOutsideOfKubernetes(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	inContainer(t, func() { assert.False(t, inContainerFS("/run/nmi")) })
}
