package ebpf

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/capabilities"
)

// ErrPrivileges means that this process lacks capabilities that it needs.
var ErrPrivileges = errors.New("mode ebpf needs the capabilities BPF and NET_ADMIN")

// errAbove means that a program of others forbids ours.
var errAbove = errors.New("a program on a cgroup above, attached without BPF_F_ALLOW_MULTI or BPF_F_ALLOW_OVERRIDE, forbids others (bpftool cgroup tree shows it): have its owner attach it with one of these flags or as a link")

// missingCapabilities names the capabilities that this process needs and lacks.
func missingCapabilities() []string {
	return capabilities.Missing(unix.CAP_BPF, unix.CAP_NET_ADMIN)
}

// Privileges says which capabilities this process lacks; nil if it has them.
func Privileges() error {
	if missing := missingCapabilities(); len(missing) > 0 {
		return fmt.Errorf("%w (missing: %s)", ErrPrivileges, strings.Join(missing, ", "))
	}
	return nil
}

// explain adds what to do about an error of the kernel, where that is known.
func explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if missing := Privileges(); missing != nil {
			return fmt.Errorf("%w: %w", missing, err)
		}
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("another build of the agent has left maps of another layout: run nmi cleanup, then start the agent again: %w", err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("mode ebpf needs Linux 5.15 or later with BTF (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	return err
}

// explainAttach is explain for a program that was not attached to a cgroup.
func explainAttach(err error, path string) error {
	if errors.Is(err, unix.EPERM) && len(missingCapabilities()) == 0 {
		return fmt.Errorf("attaching to %s: %w: %w", path, errAbove, err)
	}
	return fmt.Errorf("attaching to %s: %w", path, explain(err))
}
