package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// cgroupID names a cgroup of version 2: the inode number of its directory (cgroup_id of the
// kernel). The ID of a cgroup that has been removed is not used again.
type cgroupID uint64

// kubepods is the cgroup that the kubelet puts all pods in.
type kubepods struct {
	path string
	id   cgroupID
	own  cgroupID // of the agent's container, somewhere below
}

// errCgroupV1 means that mode ebpf cannot be used on this node.
var errCgroupV1 = errors.New("the kubelet of this node does not use cgroup v2, which mode ebpf needs: use another --redirect-mode, or a node image with cgroup v2")

// ErrNotInPod means that this process is not in a pod, where mode ebpf needs it to be.
var ErrNotInPod = errors.New("mode ebpf works only in a pod of the DaemonSet")

// findKubepods finds the cgroup of all pods by the agent's own, which is in it. So it does not
// matter how the kubelet is configured (its cgroupDriver and cgroupRoot).
func findKubepods(root string) (kubepods, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return kubepods{}, fmt.Errorf("cgroup hierarchy %s: %w: mount the node's /sys/fs/cgroup there, or set --cgroup-root", root, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return kubepods{}, fmt.Errorf("%s is not a cgroup v2 hierarchy: %w", root, errCgroupV1)
	}
	own, err := ownCgroup()
	if err != nil {
		return kubepods{}, fmt.Errorf("finding the agent's own cgroup: %w", err)
	}
	path, err := findCgroup(root, own)
	if err != nil {
		return kubepods{}, err
	}
	below, err := filepath.Rel(root, path)
	if err != nil {
		return kubepods{}, err
	}
	at := root
	for name := range strings.SplitSeq(below, "/") {
		if at = filepath.Join(at, name); !isKubepods(name) {
			continue
		}
		if at == path {
			break
		}
		id, err := idOf(at)
		return kubepods{path: at, id: id, own: own}, err
	}
	return kubepods{}, fmt.Errorf("%w: its cgroup is %s, not that of a pod (below kubepods or kubepods.slice)", ErrNotInPod, path)
}

// isKubepods reports whether the kubelet calls the cgroup of all pods so: kubepods with the
// driver cgroupfs; with systemd kubepods.slice, after the name of a parent if it has one
// (defaultNodeAllocatableCgroupName and CgroupName.ToSystemd of the kubelet).
func isKubepods(name string) bool {
	return name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice")
}

// findCgroup returns the path of the cgroup with an ID.
func findCgroup(root string, id cgroupID) (path string, err error) {
	err = filepath.WalkDir(root, func(at string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
			return nil
		case err != nil:
			return err
		case !entry.IsDir():
			return nil
		}
		if found, err := idOf(at); err == nil && found == id {
			path = at
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && path == "" {
		err = fmt.Errorf("the agent's own cgroup (ID %d) is not in %s: mount the node's /sys/fs/cgroup there, not the container's, or set --cgroup-root", id, root)
	}
	return path, err
}

func idOf(path string) (cgroupID, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	return cgroupID(st.Ino), nil
}

// valid reports whether the cgroup is still there.
func (k kubepods) valid() bool {
	id, err := idOf(k.path)
	return err == nil && id == k.id
}

// open opens the cgroup to attach a program to it.
func (k kubepods) open() (*os.File, error) { return os.Open(k.path) }

// podsBelow returns the UIDs of the pods in the cgroup of all pods: in it those of Guaranteed
// pods, and one level deeper, in those of the QoS classes, the others'. What a pod has made in
// its own cgroup is not looked at.
func podsBelow(path string) (map[cgroupID]string, error) {
	uids := make(map[cgroupID]string)
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		at := filepath.Join(path, entry.Name())
		if !entry.IsDir() || addPod(uids, at) {
			continue
		}
		inner, err := os.ReadDir(at)
		if err != nil {
			continue // removed meanwhile
		}
		for _, entry := range inner {
			if entry.IsDir() {
				addPod(uids, filepath.Join(at, entry.Name()))
			}
		}
	}
	return uids, nil
}

// addPod adds the pod whose cgroup is at a path, and reports whether it is a pod's.
func addPod(uids map[cgroupID]string, path string) bool {
	uid, ok := podUID(filepath.Base(path))
	if !ok {
		return false
	}
	if id, err := idOf(path); err == nil {
		uids[id] = uid
	}
	return true
}

// podUID returns the UID of the pod whose cgroup has a name: "pod<uid>" with the driver
// cgroupfs, "kubepods-burstable-pod<uid>.slice" with systemd, where the dashes of a UID are
// underscores (GetPodCgroupNameSuffix and escapeSystemdCgroupName of the kubelet). The UID of a
// static pod is the hash of its manifest, and not the UID of its mirror pod.
func podUID(name string) (uid string, ok bool) {
	if slice, systemd := strings.CutSuffix(name, ".slice"); systemd {
		i := strings.LastIndex(slice, "-pod")
		if i < 0 {
			return "", false
		}
		uid = strings.ReplaceAll(slice[i+len("-pod"):], "_", "-")
	} else if uid, ok = strings.CutPrefix(name, "pod"); !ok {
		return "", false
	}
	const maxUID = 64 // one has 36 characters, a hash 32
	if uid == "" || len(uid) > maxUID {
		return "", false
	}
	for _, r := range uid {
		if r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') {
			return "", false
		}
	}
	return uid, true
}
