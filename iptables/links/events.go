package links

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// receiveBuffer holds some 900 announcements of interfaces.
	receiveBuffer = 1 << 20
	// maxDrain bounds the datagrams that are read at a time.
	maxDrain = 10_000
)

// socket receives the kernel's announcements of interfaces, and lists interfaces.
type socket struct {
	file *os.File
	raw  syscall.RawConn
	buf  []byte // guarded by Tracker.mu
}

func subscribe() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	// Without the privilege for this the buffer has the default size; lost announcements
	// cause a new listing.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	s := &socket{file: os.NewFile(uintptr(fd), "rtnetlink"), buf: make([]byte, 64<<10)}
	s.raw, err = s.file.SyscallConn()
	return s, err
}

func (s *socket) close() error { return s.file.Close() }

// wait returns when there is something to read, or after the timeout. It must not block in the
// system call: the runtime would take 10 ms to notice, and hold all other goroutines up where
// the agent has one core (runtime/proc.go, retake).
func (s *socket) wait(timeout time.Duration) error {
	if err := s.file.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	woken := false
	err := s.raw.Read(func(fd uintptr) bool {
		if woken {
			return true
		}
		woken = true
		now := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a file descriptor is an int32
		n, _ := unix.Poll(now, 0)
		return n > 0
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// receive reads one datagram without waiting; EAGAIN if there is none. It is valid until
// the next call.
func (s *socket) receive() (datagram []byte, err error) {
	var n int
	var from unix.Sockaddr
	ctlErr := s.raw.Control(func(fd uintptr) {
		// MSG_TRUNC: n is the datagram's length, even if that is more than fits.
		n, from, err = unix.Recvfrom(int(fd), s.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
	})
	switch sender, _ := from.(*unix.SockaddrNetlink); {
	case ctlErr != nil:
		return nil, ctlErr
	case err != nil:
		return nil, err
	case n > len(s.buf):
		return nil, unix.ENOBUFS // truncated
	case sender == nil || sender.Pid != 0:
		return nil, nil // not the kernel
	}
	return s.buf[:n], nil
}

// list requests all interfaces. The replies arrive among the announcements, in order.
func (s *socket) list(sequence uint32) error {
	req := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req))) //nolint:gosec // 32
	binary.NativeEndian.PutUint16(req[4:], unix.RTM_GETLINK)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	binary.NativeEndian.PutUint32(req[8:], sequence)
	var err error
	ctlErr := s.raw.Control(func(fd uintptr) {
		err = unix.Sendto(int(fd), req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	return errors.Join(ctlErr, err)
}

// join adds a multicast group.
func (s *socket) join(group int) error {
	var err error
	ctlErr := s.raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
	})
	return errors.Join(ctlErr, err)
}

// eventState is how far the kernel's announcements have been read.
type eventState struct {
	readUntil  time.Time // all announcements before this time have been read
	lost       bool      // announcements may have been lost: all interfaces must be listed
	listing    uint32    // the number of the last listing
	inProgress bool      // it is
	complete   bool      // there was a complete listing

	received   int  // datagrams so far
	neighbours bool // subscribed to neighbours
}

// drainLocked reads all announcements so far, without waiting for more. It lists all
// interfaces if announcements were lost.
func (t *Tracker) drainLocked() error {
	e := &t.events
	for range maxDrain {
		now := time.Now()
		datagram, err := t.socket.receive()
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			e.lost = true
			clear(t.ports)
		case errors.Is(err, unix.EAGAIN) && e.lost:
			e.lost = false
			e.listing++
			e.inProgress = true
			if err := t.socket.list(e.listing); err != nil {
				e.lost, e.inProgress = true, false
				return err
			}
		case errors.Is(err, unix.EAGAIN):
			if !e.inProgress {
				e.readUntil = now
			}
			return nil
		case err != nil:
			return err
		default:
			e.received++
			t.applyLocked(datagram)
		}
	}
	return nil // more arrives than can be read; the caller has other work too
}

func (t *Tracker) applyLocked(datagram []byte) {
	e := &t.events
	for len(datagram) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(datagram))
		kind, flags := binary.NativeEndian.Uint16(datagram[4:]), binary.NativeEndian.Uint16(datagram[6:])
		sequence := binary.NativeEndian.Uint32(datagram[8:])
		if size < unix.SizeofNlMsghdr || size > len(datagram) {
			e.lost = true // malformed
			return
		}
		body := datagram[unix.SizeofNlMsghdr:size]
		if flags&unix.NLM_F_DUMP_INTR != 0 {
			e.lost = true // the listing may have gaps
		}
		switch kind {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			t.applyLinkLocked(body, kind == unix.RTM_DELLINK)
		case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
			t.applyNeighbourLocked(body)
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if e.inProgress && sequence == e.listing {
				e.inProgress = false
				e.lost = e.lost || kind == unix.NLMSG_ERROR
				t.listedLocked()
			}
		}
		datagram = datagram[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(datagram)):]
	}
}

// listedLocked ends a listing: if it was complete, interfaces that it lacked are gone.
func (t *Tracker) listedLocked() {
	e := &t.events
	if e.lost {
		return
	}
	e.complete = true
	for index, i := range t.ifaces {
		if i.listed != e.listing {
			t.removeLocked(index)
		}
	}
}

// applyLinkLocked records an interface (struct ifinfomsg and attributes, rtnetlink(7)).
func (t *Tracker) applyLinkLocked(body []byte, gone bool) {
	// Messages of a bridge about its ports have a family. They call a port deleted when
	// it leaves the bridge (br_ifinfo_notify).
	if len(body) < unix.SizeofIfInfomsg || body[0] != unix.AF_UNSPEC {
		return
	}
	index := int(int32(binary.NativeEndian.Uint32(body[4:]))) //nolint:gosec // it is an int32 there
	if gone {
		t.removeLocked(index)
		return
	}
	var name, hardwareAddr []byte
	for kind, value := range Attributes(body[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			name = bytes.TrimRight(value, "\x00")
		case unix.IFLA_ADDRESS:
			hardwareAddr = value
		}
	}
	e := &t.events
	if known := t.ifaces[index]; known != nil {
		// Most announcements change nothing here: a pod that takes its end of the link
		// down and up changes the state of this end each time. They allocate nothing.
		if known.name == string(name) && known.hardwareAddr == string(hardwareAddr) {
			known.listed = e.listing
			return
		}
		// If announcements were lost, the index may have been reused.
		if !e.lost && !e.inProgress {
			known.name, known.hardwareAddr, known.listed = string(name), string(hardwareAddr), e.listing
			return
		}
		t.removeLocked(index)
	}
	added := &iface{index: index, name: string(name), hardwareAddr: string(hardwareAddr), listed: e.listing}
	if e.complete { // else it is older than the Tracker
		added.appeared = e.readUntil
	}
	t.ifaces[index] = added
}

func (t *Tracker) removeLocked(index int) {
	gone := t.ifaces[index]
	if gone == nil {
		return
	}
	delete(t.ifaces, index)
	if gone.owner.UID != "" {
		t.departed.Add(gone.owner.UID, gone.owner.Started)
	}
	t.forgetPortsLocked(func(_ netip.Addr, p port) bool { return p.index == index || p.bridge == index })
}

// Attributes yields the netlink attributes in b, up to a malformed one.
func Attributes(b []byte) func(yield func(kind uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			size := int(binary.NativeEndian.Uint16(b))
			kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if size < unix.SizeofNlAttr || size > len(b) || !yield(kind, b[unix.SizeofNlAttr:size]) {
				return
			}
			b = b[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
		}
	}
}
