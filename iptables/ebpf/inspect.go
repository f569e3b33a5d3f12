package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// InPlace says which programs are not in place; nil if all are. It is for another process than the
// agent, and does not see whose programs they are.
func InPlace(pins string) error {
	var all error
	for _, h := range hooks {
		l, err := link.LoadPinnedLink(filepath.Join(pins, linksDir, h.name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, fmt.Errorf("%s is not attached", h.name))
			continue
		}
		if err != nil {
			return explain(err)
		}
		info, err := l.Info()
		_ = l.Close()
		if err != nil {
			return err
		}
		if cgroup := info.Cgroup(); cgroup == nil || cgroup.CgroupId == 0 {
			all = errors.Join(all, fmt.Errorf("%s is attached to a cgroup that has been removed", h.name))
		}
	}
	return all
}

// Possible says why the programs cannot be put in place on this node; nil if nothing is known to
// keep them from it. It changes nothing.
func Possible(cfg Config) error {
	if err := Privileges(); err != nil {
		return err
	}
	if err := checkFileSystem(filepath.Dir(cfg.Pins)); err != nil {
		return err
	}
	_, err := findKubepods(cfg.CgroupRoot)
	return err
}

// Try is Possible, and loads the programs, too: only the kernel can say whether it takes them. They are
// not attached, and nothing stays.
func Try(cfg Config) error {
	if err := Possible(cfg); err != nil {
		return err
	}
	spec, _, err := cfg.spec()
	if err != nil {
		return err
	}
	objects := new(kernelObjects)
	if err := spec.LoadAndAssign(objects, nil); err != nil {
		return fmt.Errorf("loading the programs: %w", explain(err))
	}
	return objects.Close()
}

// Above returns the cgroup above that of all pods that has a program for connect(), such as
// GuestProxyAgent's, which may rewrite connections before there is a packet; "" for none.
func Above(cgroupRoot string) (path string, err error) {
	pods, err := findKubepods(cgroupRoot)
	if err != nil {
		return "", err
	}
	for at := filepath.Dir(pods.path); ; at = filepath.Dir(at) {
		found, err := attached(at)
		if err != nil || found {
			return at, err
		}
		if at == filepath.Clean(cgroupRoot) {
			return "", nil
		}
	}
}

// attached reports whether a cgroup has a program for connect() of its own.
func attached(path string) (bool, error) {
	dir, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		return false, explain(err)
	}
	return len(found.Programs) > 0, nil
}
