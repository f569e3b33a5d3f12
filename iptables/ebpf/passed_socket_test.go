package ebpf_test

import (
	"errors"
	"strconv"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// passed is what a pod's process does with a socket that processes of other pods have, too.
func (r request) passed(held *int, to *unix.SockaddrInet4) (answer string, err error) {
	switch r.How {
	case "socket":
		*held, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return strconv.Itoa(*held), err
	case "take": // by pidfd_getfd(2): as by SCM_RIGHTS, the kernel's receive_fd installs it
		process, err := unix.PidfdOpen(r.PID, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(process)
		*held, err = unix.PidfdGetfd(process, r.FD, 0)
		return "taken", err
	case "connect":
		limit := unix.NsecToTimeval(r.Timeout.Nanoseconds())
		if err := errors.Join(
			unix.SetsockoptTimeval(*held, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
			unix.SetsockoptTimeval(*held, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		); err != nil {
			return "", err
		}
		if err = unix.Connect(*held, to); errors.Is(err, unix.EINTR) {
			err = poll(*held, unix.POLLOUT, r.Timeout)
		}
		return "connected", err
	case "disconnect": // connect(2), AF_UNSPEC
		unspecified := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(*held), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
		if errno != 0 {
			return "", errno
		}
		return "disconnected", nil
	default:
		return readAll(*held)
	}
}

// step has a pod do something with its socket, which succeeds.
func (p *pod) step(how, want string) {
	p.t.Helper()
	got := p.do(request{How: how})
	require.Equal(p.t, want, got.Answer, "%s: %s", how, got.Err)
}

// passes has a pod make a socket, and another one take it.
func (p *pod) passes(to *pod) {
	p.t.Helper()
	fd, err := strconv.Atoi(p.do(request{How: "socket"}).Answer)
	require.NoError(p.t, err)
	got := to.do(request{How: "take", PID: p.cmd.Process.Pid, FD: fd})
	require.Equal(p.t, "taken", got.Answer, got.Err)
}

// A process may hand a socket to one of another pod. A connection is that of the pod which made it
// by connect(), whoever made the socket, and whoever reads the answer: to connect takes the pod's
// own process, and what it has been given it could pass on without the socket, too.
func TestPassedSocket(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	a, b := n.addPod("10.244.0.7", guaranteedA, testbed.Routed), n.addPod("10.244.0.8", burstableB, testbed.Ptp)

	a.passes(b)
	b.step("connect", "connected")
	a.step("read", uidB)

	a.passes(b)
	a.step("connect", "connected")
	b.step("read", uidA)
	// What is noted of the socket is the second caller's, then the third's.
	b.step("disconnect", "disconnected")
	b.step("connect", "connected")
	b.step("read", uidB)
	a.step("disconnect", "disconnected")
	a.step("connect", "connected")
	b.step("read", uidA)

	// Nobody's connection is taken over while it is made.
	assert.Contains(t, b.do(request{How: "connect"}).Err, unix.EISCONN.Error())
	b.step("read", "")
	assert.Zero(t, n.handshakes())
	assert.Zero(t, n.leaks.Load())
}

// A socket of the node's network reaches the metadata service for any pod that it is handed to, as
// the host-network pod that made it could. That one has to be redirected itself to keep it from that.
func TestPassedSocketOfHostNetwork(t *testing.T) {
	n := newNode(t)
	n.agent()
	p := n.ensure()
	a, b := n.addHostPod(guaranteedA), n.addPod("10.244.0.8", burstableB, testbed.Routed)
	a.passes(b)
	b.step("connect", "connected")
	b.step("read", "imds")
	b.step("disconnect", "disconnected")

	_, err := p.Bind([]string{uidB}, nil)
	require.NoError(t, err)
	b.step("connect", "connected")
	a.step("read", uidB)
	a.step("disconnect", "disconnected")
	a.step("connect", "connected")
	b.step("read", "imds")
	b.step("disconnect", "disconnected")

	n.cfg.HostNetworkAll = true
	n.ensure()
	b.step("connect", "connected")
	a.step("read", uidB)
	assert.EqualValues(t, 2, n.leaks.Load())
}

// A caller is stored until the agent's end has found it, and not as long as the client's socket lives:
// whoever could forge its numbers would be that pod.
func TestHandshakeUsedOnce(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	a := n.addPod("10.244.0.7", guaranteedA, testbed.Routed)
	a.do(request{How: "socket"})
	a.step("connect", "connected")
	a.step("read", uidA)
	assert.Zero(t, n.handshakes()) // the socket is not closed yet
	a.step("close", "closed")
	assert.Zero(t, n.leaks.Load())
}
