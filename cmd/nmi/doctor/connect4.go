package doctor

import (
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cgroups are where cgroup v2 is mounted: alone, or beside v1. In a container that has a cgroup
// namespace, it is the container's own.
var cgroups = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// cgroup2 returns the first of the directories that is one of cgroup v2.
func cgroup2(dirs []string) (string, error) {
	for _, dir := range dirs {
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", skipf("no cgroup v2 at %s", strings.Join(dirs, " or "))
}

// Constants of linux/bpf.h.
const (
	cgroupInet4Connect = 10 // BPF_CGROUP_INET4_CONNECT
	queryEffective     = 1  // BPF_F_QUERY_EFFECTIVE: those of ancestors, too
	maxPrograms        = 64 // BPF_CGROUP_MAX_PROGS
)

// connect4Programs returns the names of the programs that run for a connect() to an IPv4 address
// in a cgroup (BPF_PROG_QUERY of bpf(2)). Those whose name may not be read have a number.
func connect4Programs(dir string) (names []string, err error) {
	cgroup, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", dir, err)
	}
	defer unix.Close(cgroup) //nolint:errcheck // nothing was written
	ids := [maxPrograms]uint32{}
	attr := struct { // the "query" member of union bpf_attr
		target, kind, queryFlags, attachFlags uint32
		programs                              unsafe.Pointer // so that Go knows of it
		count, _                              uint32
		programFlags                          uint64
	}{
		target: uint32(cgroup), kind: cgroupInet4Connect, queryFlags: queryEffective, //nolint:gosec // a descriptor is positive
		programs: unsafe.Pointer(&ids), count: maxPrograms,
	}
	if _, err := bpf(unix.BPF_PROG_QUERY, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return nil, fmt.Errorf("asking for the eBPF programs of %s: %w", dir, err)
	}
	for _, id := range ids[:min(attr.count, maxPrograms)] {
		name, err := programName(id)
		if err != nil || name == "" {
			name = fmt.Sprintf("program %d", id)
		}
		names = append(names, name)
	}
	return names, nil
}

// programName returns the name of a program, which takes CAP_SYS_ADMIN.
func programName(id uint32) (string, error) {
	byID := struct{ id, next, flags uint32 }{id: id}
	program, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, unsafe.Pointer(&byID), unsafe.Sizeof(byID))
	if err != nil {
		return "", err
	}
	defer unix.Close(program) //nolint:errcheck // nothing was written
	info := struct {          // struct bpf_prog_info, as far as its name
		_    [64]byte
		name [unix.BPF_OBJ_NAME_LEN]byte
	}{}
	byFD := struct {
		fd, length uint32
		info       unsafe.Pointer
	}{
		fd: uint32(program), length: uint32(unsafe.Sizeof(info)), //nolint:gosec // a descriptor is positive
		info: unsafe.Pointer(&info),
	}
	if _, err := bpf(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&byFD), unsafe.Sizeof(byFD)); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(info.name[:]), nil
}

// bpf is bpf(2).
func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
