package ebpf_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	cilium "github.com/cilium/ebpf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
)

// client is what the programs store of one whose end of the connection is established.
type client struct{ Outer, Inner, Local, Since uint64 }

// A connection that has the numbers of another pod's is that pod's only with its address and port,
// and soon. Here the agent's end waits for the client's ACK until the entry is written.
func TestStolenHandshake(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	victim := filepath.Dir(n.addHostPod(burstableB).dir)
	inode := func(dir string) uint64 {
		info, err := os.Stat(dir)
		require.NoError(t, err)
		return info.Sys().(*syscall.Stat_t).Ino
	}
	pod, err := n.network.AddPod("10.244.0.7", testbed.Routed)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, pod.Close()) })
	thief := n.start("system/thief", pod.Namespace) // no program runs for its own sockets
	run := func(command string) {
		t.Helper()
		got := thief.do(request{How: "run", Command: command})
		require.Empty(t, got.Err, got.Answer)
	}
	const address = 0x0af40007 << 32 // 10.244.0.7
	now := func() uint64 {
		var ts unix.Timespec
		require.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
		return uint64(ts.Nano())
	}
	const rule = " OUTPUT -p tcp --dport 2579 ! --syn -j DROP"
	for i, tc := range []struct {
		name  string
		local uint64
		since time.Duration
		want  string
	}{
		{"as it was", address | 40000, patience, uidB}, // the test shows nothing if that does not work
		{"another port", address | 1, patience, refused},
		{"another address", 1<<32 + address | 40002, patience, refused},
		{"too old", address | 40003, -5 * time.Second, refused},
	} {
		run("iptables -A" + rule)
		got := thief.do(request{How: "hold", Bind: fmt.Sprint("10.244.0.7:", 40000+i), Address: target.String()})
		require.Equal(t, "held", got.Answer, got.Err)
		got = thief.do(request{How: "numbers"})
		require.Empty(t, got.Err)
		key, err := strconv.ParseUint(got.Answer, 10, 64)
		require.NoError(t, err)
		// The address is in network byte order.
		local := uint64(htonl(uint32(tc.local>>32)))<<32 | tc.local&0xffff
		stored := client{Outer: inode(filepath.Dir(victim)), Inner: inode(victim), Local: local, Since: now() + uint64(tc.since)}
		require.NoError(t, n.pinnedMap("clients").Put(key, stored))
		run("iptables -D" + rule)
		assert.Equal(t, tc.want, thief.do(request{How: "read"}).text(), tc.name)
		thief.step("close", "closed")
		assert.Zero(t, n.handshakes(), "%s: it is used once, if only to refuse", tc.name)
	}
}

func htonl(v uint32) uint32 { return v>>24 | v>>8&0xff00 | v<<8&0xff0000 | v<<24 }

// sequenceNumbers returns the key of the socket's connection in the map of clients (tcp_repair).
func sequenceNumbers(fd int) (string, error) {
	const receive, send, offWithoutProbe = 1, 2, -1
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return "", err
	}
	var of [3]uint32
	for _, queue := range []int{receive, send} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
			return "", err
		}
		number, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		if err != nil {
			return "", err
		}
		of[queue] = uint32(number)
	}
	key := uint64(of[receive])<<32 | uint64(of[send])
	return strconv.FormatUint(key, 10), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, offWithoutProbe)
}

// What pods' sockets cost the agent does not depend on how many there are: connect() leaves nothing
// on a socket, and notes push each other out. A pod that makes many keeps no other one from its
// identity for long, and gets no other's.
func TestHoardedSockets(t *testing.T) {
	n := newNode(t)
	n.ensure()
	n.agent()
	evil, host := n.addPod("10.244.0.7", guaranteedA, testbed.Routed), n.addHostPod(guaranteedA)
	victim := n.addPod("10.244.0.8", burstableB, testbed.Routed)
	var asking sync.WaitGroup
	done := make(chan struct{})
	asking.Go(func() {
		for {
			assert.Contains(t, []string{uidB, refused}, victim.ask("blocking"))
			select {
			case <-done:
				return
			default:
			}
		}
	})
	const more = 18_000 // than the map has room for
	for _, p := range []*pod{evil, host} {
		got := p.do(request{How: "hoard", Count: more, Timeout: time.Minute})
		require.Empty(t, got.Err)
		last, err := strconv.Atoi(got.Answer)
		require.NoError(t, err)
		assert.False(t, n.stored(p, last))
	}
	close(done)
	asking.Wait()
	assert.Equal(t, uidB, victim.ask("blocking"))
	assert.Zero(t, n.leaks.Load())

	// Nor does a connection that is redirected; one that is not has to be known.
	for _, tc := range []struct {
		*pod
		want bool
	}{{victim, false}, {host, true}} {
		fd, err := strconv.Atoi(tc.do(request{How: "socket"}).Answer)
		require.NoError(t, err)
		tc.step("connect", "connected")
		assert.Equal(t, tc.want, n.stored(tc.pod, fd))
	}
}

// stored reports whether the programs have stored anything on a pod's socket.
func (n *node) stored(p *pod, fd int) bool {
	n.t.Helper()
	process, err := unix.PidfdOpen(p.cmd.Process.Pid, 0)
	require.NoError(n.t, err)
	defer unix.Close(process)
	own, err := unix.PidfdGetfd(process, fd, 0)
	require.NoError(n.t, err)
	defer unix.Close(own)
	var value [4]uint64
	err = n.pinnedMap("sockets").Lookup(int32(own), &value)
	if err != nil {
		require.ErrorIs(n.t, err, cilium.ErrKeyNotExist)
	}
	return err == nil
}

// hoard makes sockets that were connected to the metadata service in vain, from an address that
// nothing can be sent from, keeps them, and returns the last.
func (r request) hoard(to *unix.SockaddrInet4) (string, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return "", err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return "", err
	}
	last := -1
	for range r.Count {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return "", err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return "", err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return "", err
		}
		_ = unix.Connect(fd, to)
		last = fd
	}
	return strconv.Itoa(last), nil
}
