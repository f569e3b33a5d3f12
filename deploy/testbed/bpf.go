package testbed

import (
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AttachTC puts an eBPF program that changes nothing on what comes in over a link, as a tc
// filter.
func AttachTC(link netlink.Link) error {
	program, err := loadProgram()
	if err != nil {
		return err
	}
	defer unix.Close(program) //nolint:errcheck // nothing was written
	index := link.Attrs().Index
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscAdd(clsact); err != nil {
		return fmt.Errorf("adding a qdisc: %w", err)
	}
	return netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          program, Name: "pass", DirectAction: true,
	})
}

// AttachTCX is AttachTC for tcx, which kernels have since 6.6.
func AttachTCX(link netlink.Link) error {
	program, err := loadProgram()
	if err != nil {
		return err
	}
	defer unix.Close(program) //nolint:errcheck // nothing was written
	const tcxIngress = 46     // BPF_TCX_INGRESS of linux/bpf.h
	attr := struct {
		target, program, kind, flags uint32
		replace, relative            uint32
		revision                     uint64
	}{target: uint32(link.Attrs().Index), program: uint32(program), kind: tcxIngress} //nolint:gosec // both are an int32 there
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
		return fmt.Errorf("attaching a tcx program: %w", errno)
	}
	return nil
}

// The program "r0 = TC_ACT_UNSPEC; exit", where the kernel can read it.
var (
	passAll = [...]uint64{0xffffffff_0000_00b7, 0x95}
	license = [...]byte{'G', 'P', 'L', 0}
)

// loadProgram loads passAll and returns its file descriptor.
func loadProgram() (fd int, err error) {
	attr := struct { // the member of union bpf_attr for BPF_PROG_LOAD, as of Linux 6.18
		kind, instructions uint32
		code, license      uint64
		_                  [96]byte
	}{
		kind: unix.BPF_PROG_TYPE_SCHED_CLS, instructions: uint32(len(passAll)),
		code: uint64(uintptr(unsafe.Pointer(&passAll))), license: uint64(uintptr(unsafe.Pointer(&license))),
	}
	r, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return 0, fmt.Errorf("loading an eBPF program: %w", errno)
	}
	return int(r), nil
}
