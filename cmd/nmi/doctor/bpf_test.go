package doctor

import (
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headings are the third-level headings of a page.
func headings(page string) (all []string) {
	for line := range strings.Lines(page) {
		if heading, ok := strings.CutPrefix(line, "### "); ok {
			all = append(all, strings.TrimSpace(heading))
		}
	}
	return all
}

// loadConnect4 loads "r0 = 1; exit", which admits every connection, for connect4.
func loadConnect4(name string) (program int, err error) {
	code := [...]uint64{0x1_0000_00b7, 0x95}
	license := [...]byte{'G', 'P', 'L', 0}
	attr := struct { // the member of union bpf_attr for BPF_PROG_LOAD, as far as expected_attach_type
		kind, count       uint32
		code, license     unsafe.Pointer
		logLevel, logSize uint32
		logBuffer         uint64
		kernel, flags     uint32
		name              [unix.BPF_OBJ_NAME_LEN]byte
		interfaceIndex    uint32
		attachType        uint32
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, count: uint32(len(code)),
		code: unsafe.Pointer(&code), license: unsafe.Pointer(&license), attachType: cgroupInet4Connect,
	}
	copy(attr.name[:], name)
	return bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// progAttach attaches or detaches a program.
func progAttach(command int, cgroup *os.File, program int) error {
	attr := struct{ target, program, kind, flags uint32 }{
		target: uint32(cgroup.Fd()), program: uint32(program), kind: cgroupInet4Connect, //nolint:gosec // descriptors are small
	}
	if command == unix.BPF_PROG_ATTACH {
		attr.flags = unix.BPF_F_ALLOW_MULTI
	}
	_, err := bpf(command, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}
