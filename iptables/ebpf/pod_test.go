package ebpf_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// servePod does what the test asks of a pod's process.
func servePod(in io.Reader, out io.Writer) {
	requests, responses := json.NewDecoder(in), json.NewEncoder(out)
	held := -1 // the socket of "hold"
	for {
		var r request
		if requests.Decode(&r) != nil {
			return
		}
		var got response
		answer, err := r.run(&held)
		if got.Answer = answer; err != nil {
			got.Err = err.Error()
		}
		if responses.Encode(got) != nil {
			return
		}
	}
}

func (r request) run(held *int) (answer string, err error) {
	to := netip.MustParseAddrPort(r.Address)
	v4 := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	switch r.How {
	case "blocking", "bound", "mptcp", "mapped", "io_uring", "fastopen", "fastopen connect", "again", "thread":
		family, protocol := unix.AF_INET, unix.IPPROTO_TCP
		if r.How == "mapped" {
			family = unix.AF_INET6
		}
		if r.How == "mptcp" {
			protocol = unix.IPPROTO_MPTCP
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		limit := unix.NsecToTimeval(r.Timeout.Nanoseconds())
		err = errors.Join(
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit), // of connect, too
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		)
		if err != nil && (r.How != "mptcp" || !errors.Is(err, unix.EOPNOTSUPP)) { // Linux 5.15 has none for MPTCP
			return "", err
		}
		if err := r.bind(fd); err != nil {
			return "", err
		}
		switch r.How {
		case "mapped":
			err = unix.Connect(fd, &unix.SockaddrInet6{Port: v4.Port, Addr: netip.AddrFrom16(to.Addr().As16()).As16()})
		case "io_uring":
			err = uringConnect(fd, to)
		case "fastopen":
			err = unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, v4)
		case "fastopen connect":
			if err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err == nil {
				if err = unix.Connect(fd, v4); err == nil {
					_, err = unix.Write(fd, []byte("hello"))
				}
			}
		case "again": // after it has been refused
			other := &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}}
			if err = unix.Connect(fd, other); err == nil {
				return "", errors.New("not refused")
			}
			err = unix.Connect(fd, v4)
		default:
			err = unix.Connect(fd, v4)
		}
		if errors.Is(err, unix.EINTR) { // by a signal of Go's runtime; it goes on
			err = poll(fd, unix.POLLOUT, r.Timeout)
		}
		if err != nil {
			return "", fmt.Errorf("connect: %w", err)
		}
		return readAll(fd)
	case "non-blocking":
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, v4); !errors.Is(err, unix.EINPROGRESS) {
			return "", fmt.Errorf("connect: %w", err)
		}
		if err := poll(fd, unix.POLLOUT, r.Timeout); err != nil {
			return "", err
		}
		if err := poll(fd, unix.POLLIN, r.Timeout); err != nil {
			return "", err
		}
		return readAll(fd)
	case "udp", "raw", "icmp":
		return "", sendPacket(r.How, v4)
	case "hold": // connect, and keep the socket
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		*held = fd
		if err := r.bind(fd); err != nil {
			return "", err
		}
		limit := unix.NsecToTimeval(r.Timeout.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
			return "", err
		}
		return "held", unix.Connect(fd, v4)
	case "send": // on that socket
		limit := unix.NsecToTimeval(r.Timeout.Nanoseconds())
		if err := unix.SetsockoptTimeval(*held, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
			return "", err
		}
		if _, err := unix.Write(*held, []byte("hello")); err != nil {
			return "", err
		}
		var p [64]byte
		n, err := unix.Read(*held, p[:])
		return string(p[:max(n, 0)]), err
	case "close":
		return "closed", unix.Close(*held)
	case "run":
		out, err := exec.Command("sh", "-c", r.Command).CombinedOutput()
		return string(out) + " ", err
	case "threaded": // this thread moves to a cgroup, and connects
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := os.WriteFile(r.Cgroup+"/cgroup.threads", []byte("0"), 0o644); err != nil {
			return "", err
		}
		r.How = "blocking"
		return r.run(held)
	case "move": // the process does
		return "moved", os.WriteFile(r.Cgroup+"/cgroup.procs", []byte("0"), 0o644)
	case "socket", "take", "connect", "disconnect", "read":
		return r.passed(held, v4)
	case "connects":
		return r.connects(v4)
	case "numbers":
		return sequenceNumbers(*held)
	case "hoard":
		return r.hoard(v4)
	case "flood":
		return r.flood()
	case "relay":
		return r.relay()
	}
	return "", errors.New("unknown request " + r.How)
}

// bind binds a socket to the address that the test has chosen, if it has.
func (r request) bind(fd int) error {
	if r.Bind == "" {
		return nil
	}
	from := netip.MustParseAddrPort(r.Bind)
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // no TIME_WAIT
		unix.Bind(fd, &unix.SockaddrInet4{Port: int(from.Port()), Addr: from.Addr().As4()}),
	)
}

// kept keeps sockets from being closed.
var kept []io.Closer

// flood makes so many connections to the metadata service, which end at a server of the pod's own
// that has the agent's address, and keeps them. It accepts none: they are established all the same.
func (r request) flood() (string, error) {
	ln, err := net.Listen("tcp4", r.Bind)
	if err != nil {
		return "", err
	}
	kept = append(kept, ln)
	for range r.Count {
		c, err := net.Dial("tcp4", r.Address)
		if err != nil {
			return "", err
		}
		kept = append(kept, c)
	}
	return "flooded", nil
}

// connects connects and closes so often, and returns how long that took, in nanoseconds. To an
// address on loopback it opens the server itself.
func (r request) connects(to *unix.SockaddrInet4) (string, error) {
	if to.Addr[0] == 127 {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		defer ln.Close()
		to.Port = ln.Addr().(*net.TCPAddr).Port
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_ = c.(*net.TCPConn).SetLinger(0)
				_ = c.Close()
			}
		}()
	}
	began := time.Now()
	for range r.Count {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		if err := unix.Connect(fd, to); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNRESET) {
			_ = unix.Close(fd)
			return "", err
		}
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}) // no TIME_WAIT
		_ = unix.Close(fd)
	}
	return strconv.FormatInt(time.Since(began).Nanoseconds(), 10), nil
}

// sidecarGID is the group of a sidecar, by which the pod's rules know it.
const sidecarGID = 1337

// relay is a proxy in the pod, such as a service mesh's, to which rules in the pod redirect: it
// dials what the client had dialled.
func (r request) relay() (string, error) {
	if err := syscall.Setgid(sidecarGID); err != nil {
		return "", err
	}
	ln, err := net.Listen("tcp4", r.Bind)
	if err != nil {
		return "", err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				raw, _ := c.(*net.TCPConn).SyscallConn()
				var to *unix.IPv6Mreq
				_ = raw.Control(func(fd uintptr) { to, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST) })
				if err != nil {
					return
				}
				sockaddr := to.Multiaddr
				address := netip.AddrPortFrom(netip.AddrFrom4([4]byte(sockaddr[4:8])), binary.BigEndian.Uint16(sockaddr[2:4]))
				upstream, err := net.Dial("tcp4", address.String())
				if err != nil {
					return
				}
				defer upstream.Close()
				_, _ = io.WriteString(c, "by way of "+address.String()+": ")
				_, _ = io.Copy(c, upstream)
			}()
		}
	}()
	return "listening", nil
}
