package ebpf

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mountedPins is Config.Pins where the manifest mounts the node's BPF file system. The profile that
// containerd gives containers under AppArmor forbids to write in all of /sys/fs but cgroup (its
// contrib/apparmor/template.go), by the paths that the container has.
const mountedPins = "/host/sys/fs/bpf/nmi"

// FindPins returns Config.Pins in the BPF file system that this process has: at
// /host/sys/fs/bpf, or else where it is on the node, DefaultPins.
func FindPins() string {
	if Mounted(mountedPins) {
		return mountedPins
	}
	return DefaultPins
}

// Mounted reports whether the directory above Config.Pins is in a BPF file system. Nothing can be
// said of programs where it is not.
func Mounted(pins string) bool {
	var st unix.Statfs_t
	return unix.Statfs(filepath.Dir(pins), &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// adviceMount is what to do about a BPF file system that is missing.
const adviceMount = "mount the node's /sys/fs/bpf, writable, as deploy/manifests/ebpf/daemonset.yaml does"

// checkFileSystem says why a directory is not in a BPF file system that can be written to.
func checkFileSystem(dir string) error {
	var st unix.Statfs_t
	switch err := unix.Statfs(dir, &st); {
	case err != nil:
		return fmt.Errorf("BPF file system %s: %w: %s", dir, err, adviceMount)
	case st.Type != unix.BPF_FS_MAGIC:
		return fmt.Errorf("%s is not in a BPF file system: %s (on the node: mount -t bpf bpf /sys/fs/bpf)", dir, adviceMount)
	case st.Flags&unix.ST_RDONLY != 0:
		return fmt.Errorf("the BPF file system of %s is read-only: %s", dir, adviceMount)
	}
	return nil
}

// explainPins is explain for what writes to the directory of pins. The verifier, too, refuses a
// program with EACCES.
func explainPins(dir string, err error) error {
	if _, verifier := errors.AsType[*ebpf.VerifierError](err); !verifier && errors.Is(err, unix.EACCES) && Privileges() == nil {
		return fmt.Errorf("cannot pin programs in %s: permission denied: the container's AppArmor profile, or SELinux, forbids it; see the node's audit log: %w", dir, err)
	}
	return explain(err)
}
