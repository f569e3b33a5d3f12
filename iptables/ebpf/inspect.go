package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

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
