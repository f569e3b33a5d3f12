package handover

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// inContainerFS reports whether a directory is in the file system of this container, where
// no other pod sees it: a manifest of the old NMI mounts no directory of the node there.
//
// In a container that is whatever is on the same mount as the root. The names of file
// systems would not tell: an overlay can be the node's own root, as in kind, and a tmpfs
// is both the node's /run and an emptyDir in memory.
func inContainerFS(dir string) bool {
	if os.Getenv("KUBERNETES_SERVICE_HOST") == "" { // the kubelet sets it in every container
		return false
	}
	root, err := mountID("/")
	if err != nil {
		return false
	}
	for {
		id, err := mountID(dir)
		if !errors.Is(err, fs.ErrNotExist) {
			return err == nil && id == root
		}
		dir = filepath.Dir(dir) // what does not exist yet will be made on its parent's mount
	}
}

// mountID returns the number of the mount that a file is on (statx(2), since Linux 5.8).
func mountID(path string) (uint64, error) {
	var s unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &s); err != nil {
		return 0, err
	}
	if s.Mask&unix.STATX_MNT_ID == 0 {
		return 0, errors.ErrUnsupported
	}
	return s.Mnt_id, nil
}
