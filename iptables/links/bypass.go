package links

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrBypass means that packets of pods may pass iptables by: eBPF programs on the pods'
// interfaces hand them to their destination (Cilium's BPF host routing), and no rule sees
// them. Programs are there with Cilium's legacy host routing too, which does not bypass
// iptables, and nothing outside of Cilium tells the two apart.
var ErrBypass = errors.New("packets of pods may bypass iptables")

// ciliumHost is the interface that Cilium makes on every node.
const ciliumHost = "cilium_host"

// Bypass returns an error that wraps ErrBypass, with the reason, if pods' packets may
// bypass iptables: there is cilium_host, and an interface of a pod's own is a netkit, or
// runs an eBPF program on what the pod sends, or does not let that be found out.
func Bypass() error {
	var absent netlink.LinkNotFoundError
	if _, err := netlink.LinkByName(ciliumHost); errors.As(err, &absent) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: looking for %s: %w", ErrBypass, ciliumHost, err)
	}
	all, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("%w: there is %s, and the interfaces of pods cannot be listed: %w", ErrBypass, ciliumHost, err)
	}
	for _, link := range all {
		if !podKind(link) {
			continue
		}
		program, err := ingressProgram(link)
		switch {
		case err != nil:
			return fmt.Errorf("%w: there is %s, and it cannot be told whether %s runs an eBPF program on what its pod sends: %w",
				ErrBypass, ciliumHost, link.Attrs().Name, err)
		case program != "":
			return fmt.Errorf("%w: there is %s, and %s %s", ErrBypass, ciliumHost, link.Attrs().Name, program)
		}
	}
	return nil
}

// ingressProgram says which eBPF program runs on what a pod sends over its interface; ""
// if none does.
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

// tcxPrograms counts the tcx programs on what comes in over an interface, as bpf(2)'s
// BPF_PROG_QUERY has it.
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
	case unix.EINVAL, unix.ENOENT, unix.EOPNOTSUPP, unix.ENOSYS: // an older kernel, or none there
		return 0, nil
	default:
		return 0, fmt.Errorf("asking for its tcx programs: %w", errno)
	}
}
