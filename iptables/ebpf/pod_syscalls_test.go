package ebpf_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func poll(fd int, events int16, timeout time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(fds, int(timeout.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return errors.New("timeout")
		}
		return nil
	}
}

func readAll(fd int) (string, error) {
	var all []byte
	for {
		var p [256]byte
		n, err := unix.Read(fd, p[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 {
			return string(all), err
		}
		all = append(all, p[:n]...)
	}
}

// sendPacket sends one packet to the metadata service that is not of a TCP socket.
func sendPacket(how string, to *unix.SockaddrInet4) error {
	switch how {
	case "udp":
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte("x"), 0, to)
	case "icmp":
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}, 0, to)
	default: // an IP header of its own
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		packet := make([]byte, 40)
		packet[0], packet[8], packet[9] = 0x45, 64, unix.IPPROTO_TCP
		copy(packet[16:], to.Addr[:])
		binary.BigEndian.PutUint16(packet[22:], uint16(to.Port))
		packet[32], packet[33] = 0x50, 2 // a SYN
		return unix.Sendto(fd, packet, 0, to)
	}
}

// Of linux/io_uring.h, as far as one connect() needs it.
type uringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	_                                                    [3]uint32
	sq                                                   struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

// uringConnect connects by io_uring (IORING_OP_CONNECT).
func uringConnect(fd int, to netip.AddrPort) error {
	const opConnect, enterGetEvents, sqes = 16, 1, 0x10000000
	var params uringParams
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 2, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring: %w", errno)
	}
	defer unix.Close(int(ring))
	size := max(params.sq.array+params.sqEntries*4, params.cq.cqes+params.cqEntries*16)
	queue, err := unix.Mmap(int(ring), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	completions := queue // IORING_FEAT_SINGLE_MMAP
	entries, err := unix.Mmap(int(ring), sqes, int(params.sqEntries)*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	sockaddr := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sockaddr.Port))[:], to.Port())
	native := binary.NativeEndian
	entries[0] = opConnect
	native.PutUint32(entries[4:], uint32(fd))
	native.PutUint64(entries[8:], uint64(unix.SizeofSockaddrInet4)) // off is the length
	native.PutUint64(entries[16:], uint64(uintptr(unsafe.Pointer(&sockaddr))))
	native.PutUint32(queue[params.sq.array:], 0)
	native.PutUint32(queue[params.sq.tail:], 1)
	_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, enterGetEvents, 0, 0)
	runtime.KeepAlive(&sockaddr)
	if errno != 0 {
		return fmt.Errorf("io_uring_enter: %w", errno)
	}
	result := int32(native.Uint32(completions[params.cq.cqes+8:])) // res of struct io_uring_cqe
	if result < 0 {
		return unix.Errno(-result)
	}
	return nil
}
