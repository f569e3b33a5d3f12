package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Cleanup removes the links and maps of all versions that are pinned in a directory, and
// reports whether there were any. The redirect goes first and the fence last: pods are refused
// until the end. It needs no capability. Without BPF a program that another process holds stays
// attached, and one that none holds for a moment.
func Cleanup(pins string) (removed bool, err error) {
	switch _, err := os.Stat(pins); {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	}
	if err := checkFileSystem(pins); err != nil { // nothing else is removed with all that is in it
		return false, err
	}
	var all error
	for _, h := range slices.Backward(hooks) {
		pin := filepath.Join(pins, linksDir, h.name)
		l, err := link.LoadPinnedLink(pin, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		switch {
		case err == nil:
			// Another process may hold the link: without its pin it would stay attached.
			err = errors.Join(l.(interface{ Detach() error }).Detach(), os.Remove(pin), l.Close()) //nolint:errcheck // a cgroup's link has it
		case errors.Is(err, unix.EPERM) && Privileges() != nil:
			err = os.Remove(pin)
		}
		if err != nil {
			all = errors.Join(all, fmt.Errorf("removing the program %s: %w", h.name, explain(err)))
		}
	}
	if all != nil {
		return true, all // the maps are in use
	}
	return true, os.RemoveAll(pins)
}
