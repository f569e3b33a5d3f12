package links

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrBypass means that pods' packets may bypass iptables: eBPF programs on the pods'
// interfaces forward them (Cilium's BPF host routing), and no rule sees them. With
// Cilium's legacy host routing there are programs too, which do not bypass iptables;
// nothing outside of Cilium tells the two apart.
var ErrBypass = errors.New("pods' packets may bypass iptables")

// ciliumHost is an interface that Cilium creates on every node.
const ciliumHost = "cilium_host"

// Bypass returns an error that wraps ErrBypass, with the reason, if pods' packets may
// bypass iptables: cilium_host exists, and a pod's interface is a netkit device, or has an
// eBPF program on its ingress, or cannot be inspected.
func Bypass() error {
	var absent netlink.LinkNotFoundError
	if _, err := netlink.LinkByName(ciliumHost); errors.As(err, &absent) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: looking for %s: %w", ErrBypass, ciliumHost, err)
	}
	all, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("%w: %s exists, and listing pods' interfaces failed: %w", ErrBypass, ciliumHost, err)
	}
	for _, link := range all {
		if !isPodLink(link) {
			continue
		}
		program, err := ingressProgram(link)
		switch {
		case err != nil:
			return fmt.Errorf("%w: %s exists, and inspecting %s for eBPF programs failed: %w",
				ErrBypass, ciliumHost, link.Attrs().Name, err)
		case program != "":
			return fmt.Errorf("%w: %s exists, and %s %s", ErrBypass, ciliumHost, link.Attrs().Name, program)
		}
	}
	return nil
}

// ingressProgram says which kind of eBPF program an interface has on its ingress, where a
// pod's packets arrive; "" for none.
func ingressProgram(link netlink.Link) (string, error) {
	if link.Type() == "netkit" {
		return "is a netkit device", nil
	}
	switch n, err := tcxPrograms(link.Attrs().Index); {
	case err != nil:
		return "", err
	case n > 0:
		return "has a tcx ingress program", nil
	}
	filters, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return "", fmt.Errorf("listing its tc filters: %w", err)
	}
	for _, f := range filters {
		if f.Type() == "bpf" {
			return "has a tc ingress program", nil
		}
	}
	return "", nil
}

// bpfTCXIngress is BPF_TCX_INGRESS of enum bpf_attach_type (linux/bpf.h, since 6.6).
const bpfTCXIngress = 46

// tcxPrograms counts the tcx programs on an interface's ingress (BPF_PROG_QUERY of bpf(2)).
func tcxPrograms(index int) (int, error) {
	attr := struct { // the "query" member of union bpf_attr
		ifindex, attachType      uint32
		queryFlags, attachFlags  uint32
		programs                 uint64
		count, _                 uint32
		programFlags             uint64
		linkIDs, linkAttachFlags uint64
		revision                 uint64
	}{ifindex: uint32(index), attachType: bpfTCXIngress} //nolint:gosec // an index is an int32 there
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	switch errno {
	case 0:
		return int(attr.count), nil
	case unix.EINVAL, unix.ENOENT, unix.EOPNOTSUPP, unix.ENOSYS: // an older kernel, or no program
		return 0, nil
	default:
		return 0, fmt.Errorf("querying its tcx programs: %w", errno)
	}
}
