package ebpf_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/ebpf"
)

// ensureWith is Ensure with no other capabilities than these.
func (n *node) ensureWith(capabilities ...int) error {
	return with(capabilities, func() error {
		p := ebpf.New(n.cfg)
		_, err := p.Ensure()
		if err == nil {
			n.programs.Store(p)
			n.t.Cleanup(p.Close)
		}
		return err
	})
}

// with calls fn with no other capabilities than these.
func with(capabilities []int, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		for _, c := range capabilities {
			data[c/32].Effective |= 1 << (c % 32)
			data[c/32].Permitted |= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	return <-done
}

// What AppArmor or SELinux forbids is EACCES, as is what a directory's mode does.
func TestPinsForbidden(t *testing.T) {
	n := newNode(t)
	n.agent()
	forbid := func(dir string) {
		t.Helper()
		require.NoError(t, os.Chown(dir, 65534, 65534))
		require.NoError(t, os.Chmod(dir, 0o755))
	}
	const want = ": permission denied: the container's AppArmor profile, or SELinux, forbids it; see the node's audit log"
	forbid(filepath.Dir(n.cfg.Pins))
	require.ErrorContains(t, n.ensureWith(unix.CAP_BPF, unix.CAP_NET_ADMIN), "cannot pin programs in "+n.cfg.Pins+want)
	for _, dir := range []string{"maps-1", "links"} { // that another agent has made
		require.NoError(t, os.MkdirAll(filepath.Join(n.cfg.Pins, "maps-1"), 0o700))
		require.NoError(t, os.MkdirAll(filepath.Join(n.cfg.Pins, "links"), 0o700))
		forbid(filepath.Join(n.cfg.Pins, dir))
		require.ErrorContains(t, n.ensureWith(unix.CAP_BPF, unix.CAP_NET_ADMIN), "cannot pin programs in "+n.cfg.Pins+want, dir)
		require.NoError(t, os.RemoveAll(n.cfg.Pins))
	}
}

func TestFileSystemReadOnly(t *testing.T) {
	n := newNode(t)
	const want = ": mount the node's /sys/fs/bpf, writable, as deploy/manifests/ebpf/daemonset.yaml does"
	dir := filepath.Dir(n.cfg.Pins)
	require.NoError(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	p := ebpf.New(n.cfg)
	defer p.Close()
	_, err := p.Ensure()
	require.ErrorContains(t, err, dir+" is read-only"+want)
	require.ErrorContains(t, ebpf.Possible(n.cfg), dir+" is read-only"+want)
	n.cfg.Pins = "/nowhere/bpf/nmi"
	assert.ErrorContains(t, ebpf.Possible(n.cfg), "no such file or directory"+want)
}

// The container's own /sys/fs/bpf is not used where the node's is mounted beside it.
func TestFindPins(t *testing.T) {
	require.Equal(t, "/sys/fs/bpf/nmi", ebpf.FindPins())
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the mount namespace ends with the thread
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			// Over a directory that every machine has: none is made in the machine's root.
			if err := unix.Mount("none", "/mnt", "tmpfs", 0, ""); err != nil {
				return err
			}
			if err := os.MkdirAll("/mnt/host/sys/fs/bpf", 0o755); err != nil {
				return err
			}
			if err := unix.Mount("bpf", "/mnt/host/sys/fs/bpf", "bpf", 0, ""); err != nil {
				return err
			}
			return unix.Chroot("/mnt")
		}()
		done <- nil
		assert.Equal(t, "/host/sys/fs/bpf/nmi", ebpf.FindPins())
		done <- nil
	}()
	require.NoError(t, <-done)
	<-done
	<-done
}
