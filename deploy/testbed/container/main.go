// Command container replaces itself with a program of an image, in what the program needs of a
// container: the image's root file system, read-only, a mount namespace, and a set of
// capabilities beyond which it cannot get. The network namespace stays. It needs root.
//
//	container -root <directory> -capabilities NET_ADMIN,NET_RAW -mount <directory>[:<path>],… <program> <arguments>
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities are those that an agent could be thought to need.
var capabilities = map[string]uintptr{
	"NET_ADMIN": unix.CAP_NET_ADMIN, "NET_RAW": unix.CAP_NET_RAW, "NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"SYS_PTRACE": unix.CAP_SYS_PTRACE, "DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE,
}

func main() {
	root := flag.String("root", "", "directory of the image's files")
	keep := flag.String("capabilities", "", "capabilities to keep, separated by commas")
	mount := flag.String("mount", "", "directories to mount at these paths, or at the same ones, separated by commas")
	flag.Parse()
	fmt.Fprintln(os.Stderr, "container:", run(*root, *keep, *mount, flag.Args()))
	os.Exit(1)
}

// run returns only if it fails.
func run(root, keep, mount string, command []string) error {
	// Of the thread: the namespace, the root and the capabilities.
	runtime.LockOSThread()
	if err := enterRoot(root, mount); err != nil {
		return err
	}
	if err := limitCapabilities(keep); err != nil {
		return err
	}
	return fmt.Errorf("starting %s: %w", command[0], unix.Exec(command[0], command, os.Environ()))
}

func enterRoot(root, mount string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	in := func(path string) string { return filepath.Join(root, path) }
	volumes := make(map[string]string) // by target
	for m := range strings.SplitSeq(mount, ",") {
		source, target, found := strings.Cut(m, ":")
		switch {
		case source == "":
			continue
		case !found:
			target = source
		}
		volumes[target] = source
		if err := os.MkdirAll(in(target), 0o700); err != nil { // while the root can be written to, as container runtimes do
			return err
		}
	}
	const noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{root, root, "", unix.MS_BIND},
		{"", root, "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY},
		{"proc", in("/proc"), "proc", noExec},
		{"/proc/sys", in("/proc/sys"), "", unix.MS_BIND},
		{"", in("/proc/sys"), "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY},
		{"sysfs", in("/sys"), "sysfs", noExec | unix.MS_RDONLY},
		{"/dev", in("/dev"), "", unix.MS_BIND},
		{"tmpfs", in("/run"), "tmpfs", noExec},
		{"tmpfs", in("/tmp"), "tmpfs", noExec},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	for target, source := range volumes {
		err := os.MkdirAll(in(target), 0o700) // again, in a tmpfs
		if err = errors.Join(err, unix.Mount(source, in(target), "", unix.MS_BIND, "")); err != nil {
			return fmt.Errorf("mounting %s: %w", target, err)
		}
	}
	return errors.Join(unix.Chroot(root), unix.Chdir("/"))
}

// limitCapabilities takes all other capabilities from what the next program can have. User 0 has
// all of those that are left (capabilities(7), "Capabilities and execution of programs by root").
func limitCapabilities(keep string) error {
	kept := make(map[uintptr]bool)
	for name := range strings.SplitSeq(keep, ",") {
		number, ok := capabilities[name]
		if !ok && name != "" {
			return fmt.Errorf("unknown capability %q", name)
		}
		kept[number] = ok
	}
	for number := range uintptr(unix.CAP_LAST_CAP + 1) {
		if kept[number] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, number, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("dropping capability %d: %w", number, err)
		}
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) // allowPrivilegeEscalation: false
}
