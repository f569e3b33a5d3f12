package bootguard

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
)

// The names that the agent writes below the directory of units. An os.Root follows no
// symlink out of it.
const (
	// wants is the directory of units that a boot starts. "systemctl enable" of the
	// kubelet or of any other service makes it, and the agent does not: without it this
	// is no directory of systemd's, such as an empty one that the container runtime has
	// made for the mount.
	wants    = "multi-user.target.wants"
	linkName = wants + "/" + Unit
	linkTo   = "../" + Unit
	tempName = "." + Unit + ".tmp" // systemd ignores names with a dot in front

	maxUnitSize = 64 << 10 // bytes that are read of a file
)

// errForeign means that a name is taken by what the agent has not written.
var errForeign = errors.New("nmi has not written it and leaves it alone: remove it, if it is not needed")

// install makes the unit file and its symlink as desired, and reports whether they were
// not.
func install(dir, content string) (written bool, err error) {
	root, err := open(dir)
	if err != nil {
		return false, err
	}
	defer root.Close() //nolint:errcheck // nothing is written to it
	present, err := readUnit(root)
	if err == nil && present != content {
		written = true
		err = writeUnit(root, content)
	}
	if err != nil {
		return false, explain(dir, err)
	}
	enabled, err := isEnabled(root)
	if err == nil && !enabled {
		written = true
		err = root.Symlink(linkTo, linkName)
	}
	return written, explain(dir, err)
}

// Dirs are where the node's directory of units is if nobody says otherwise: on the node itself,
// and in a container of the chart's.
var Dirs = []string{"/etc/systemd/system", "/host/etc/systemd/system"}

// Remove removes the unit and its symlink from the node's directory of units, and reports
// whether there were any. What the agent has not written stays, and is no error. The
// commands of a unit that has run stay in effect; systemd forgets it at the next boot, or
// with "systemctl daemon-reload". A directory that does not exist is an error that wraps
// fs.ErrNotExist.
func Remove(dir string) (removed bool, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, explain(dir, err)
	}
	defer root.Close() //nolint:errcheck // nothing is written to it
	present, err := readUnit(root)
	var enabled bool
	if err == nil {
		enabled, err = isEnabled(root)
	}
	if err != nil && !errors.Is(err, errForeign) {
		return false, explain(dir, err)
	}
	var tempErr, linkErr, unitErr error
	if _, err := root.Lstat(tempName); err == nil { // of an agent that was killed while it wrote
		tempErr = root.Remove(tempName)
	}
	if enabled {
		linkErr = root.Remove(linkName)
	}
	if present != "" {
		unitErr = root.Remove(Unit)
	}
	return enabled || present != "", explain(dir, errors.Join(tempErr, linkErr, unitErr))
}

// open opens a directory of units that a boot reads.
func open(dir string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err == nil {
		if _, err = root.Stat(wants); err == nil {
			return root, nil
		}
		_ = root.Close()
	}
	return nil, explain(dir, err)
}

// readUnit returns the content of the unit file; "" if there is none. One that the agent
// has not written is an error.
func readUnit(root *os.Root) (string, error) {
	info, err := root.Lstat(Unit)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is not a regular file: %w", Unit, errForeign)
	}
	f, err := root.Open(Unit)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // read only
	content, err := io.ReadAll(io.LimitReader(f, maxUnitSize))
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(string(content), marker) {
		return "", fmt.Errorf("%s is another program's: %w", Unit, errForeign)
	}
	return string(content), nil
}

// writeUnit replaces the unit file at once: at no time, and after no crash, is there half
// of one.
func writeUnit(root *os.Root, content string) error {
	if err := root.Remove(tempName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(tempName, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()) // whatever the umask
	if err == nil {
		err = root.Rename(tempName, Unit)
	}
	if err != nil {
		return errors.Join(err, root.Remove(tempName))
	}
	return nil
}

// isEnabled reports whether the symlink is there, the agent's or that of "systemctl
// enable", whose target is absolute. Anything else of that name is an error.
func isEnabled(root *os.Root) (bool, error) {
	info, err := root.Lstat(linkName)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		target, err := root.Readlink(linkName)
		if err != nil || path.Base(target) == Unit {
			return true, err
		}
	}
	return false, fmt.Errorf("%s is not a symlink to %s: %w", linkName, Unit, errForeign)
}
