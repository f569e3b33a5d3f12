package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The protocol before tokens, to the byte, as agents up to November 2026 speak it (cmd/nmi
// of commit ecddfe4). Those stay on nodes that are upgraded, and come back by a rollback.

// oldAgent sends packets as those did: with plain writes and reads, and no file with a
// request.
type oldAgent struct {
	t    *testing.T
	conn *net.UnixConn
}

func (o oldAgent) sends(text string, fds ...int) {
	o.t.Helper()
	if len(fds) == 0 {
		_, err := o.conn.Write([]byte(text))
		require.NoError(o.t, err)
		return
	}
	_, _, err := o.conn.WriteMsgUnix([]byte(text), unix.UnixRights(fds...), nil)
	require.NoError(o.t, err)
}

// reads returns the next packet, read as the old agent does after the offer.
func (o oldAgent) reads() (string, error) {
	require.NoError(o.t, o.conn.SetDeadline(time.Now().Add(patience)))
	b := make([]byte, 64)
	n, err := o.conn.Read(b)
	return string(b[:n]), err
}

// isSilent asserts that the other end says nothing, which the old agent would take for the
// other's exit.
func (o oldAgent) isSilent() {
	o.t.Helper()
	require.NoError(o.t, o.conn.SetDeadline(time.Now().Add(100*time.Millisecond)))
	text, err := o.conn.Read(make([]byte, 64))
	require.ErrorIs(o.t, err, os.ErrDeadlineExceeded, text)
}

func TestOldAgentTakesOver(t *testing.T) {
	for request, pauses := range map[string]bool{"take": true, "take, for another port": false} {
		t.Run(request, func(t *testing.T) {
			dir := t.TempDir()
			a := running(t, dir, "a token that an old agent would not understand")
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(dir, "handover.sock"), Net: "unixpacket"})
			require.NoError(t, err)
			old := oldAgent{t, conn}
			var names []string
			for {
				b, rights := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
				n, rn, _, _, err := conn.ReadMsgUnix(b, rights)
				require.NoError(t, err)
				if string(b[:n]) == "that is all" {
					assert.Zero(t, rn)
					break
				}
				names = append(names, string(b[:n]))
				control, err := unix.ParseSocketControlMessage(rights[:rn])
				require.NoError(t, err)
				require.Len(t, control, 1, names)
				fds, err := unix.ParseUnixRights(&control[0])
				require.NoError(t, err)
				require.Len(t, fds, 1)
				require.NoError(t, unix.Close(fds[0]))
			}
			assert.Equal(t, []string{"nmi-port", "prometheus-port", "owner.lock"}, names)
			old.sends(request)
			a.does("release")
			text, err := old.reads()
			require.NoError(t, err)
			assert.Equal(t, "taken", text)
			old.isSilent()
			a.front.mu.Lock()
			assert.Equal(t, pauses, a.front.paused != nil)
			a.front.mu.Unlock()
			require.NoError(t, conn.Close())
			a.does("resume")
			assert.NotContains(t, a.log.String(), "tokens")
		})
	}
}

func TestTakeoverFromAnOldAgent(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, "handover.sock"), Net: "unixpacket"})
	require.NoError(t, err)
	defer ln.Close()
	front, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer front.Close()
	lock, err := lockNode(t.Context(), dir)
	require.NoError(t, err)
	next := newTestAgent(t, dir)
	received := make(chan error)
	go func() { received <- next.Receive(t.Context()) }()
	conn, err := ln.AcceptUnix()
	require.NoError(t, err)
	old := oldAgent{t, conn}
	raw, err := front.(*net.TCPListener).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { old.sends("nmi-port", int(fd)) }))
	old.sends("owner.lock", int(lock.Fd()))
	old.sends("that is all")
	require.NoError(t, <-received)

	next.listens(netip.MustParseAddrPort(front.Addr().String()), anyPort)
	acquired := make(chan error)
	close(next.ready)
	go func() { acquired <- next.Acquire(t.Context(), next.ready, next.restore) }()
	text, err := old.reads() // without the file, which the kernel closes
	require.NoError(t, err)
	assert.Equal(t, "take", text)
	start := time.Now()
	old.sends("taken")
	require.NoError(t, <-acquired)
	assert.Less(t, time.Since(start), tokensTimeout, "it does not wait for tokens")
	assert.Empty(t, next.received)
	assert.NotContains(t, next.log.String(), "level=WARN")
	next.offers()
	old.isSilent()
	require.NoError(t, lock.Close())
	require.NoError(t, conn.Close())
	next.does("resume")
}

// TestNothingIsHandedToOtherUsers has a process of another user connect, to a socket whose
// mode has been opened.
func TestNothingIsHandedToOtherUsers(t *testing.T) {
	const path = "HANDOVER_TEST_SOCKET"
	if socket := os.Getenv(path); socket != "" { // the other process
		conn, err := net.Dial("unixpacket", socket)
		require.NoError(t, err)
		n, err := conn.Read(make([]byte, 64))
		require.ErrorIs(t, err, io.EOF)
		require.Zero(t, n)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run a process as nobody")
	}
	dir, err := os.MkdirTemp("", "handover") //nolint:usetesting // nobody must be able to enter it
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, os.RemoveAll(dir)) })
	a := running(t, dir)
	for _, open := range []string{dir, filepath.Join(dir, handoverSocket)} {
		require.NoError(t, os.Chmod(open, 0o777))
	}
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	binary := filepath.Join(dir, "test")
	require.NoError(t, os.WriteFile(binary, self, 0o755))
	other := exec.CommandContext(t.Context(), binary, "-test.run=^TestNothingIsHandedToOtherUsers$")
	other.Env = []string{path + "=" + filepath.Join(dir, handoverSocket)}
	other.Dir = "/"
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := other.CombinedOutput()
	require.NoError(t, err, string(out))
	a.says("of user 65534 is neither root nor this agent's user: nothing is handed to it")
	assert.Empty(t, drain(a.acts))
}

func TestAllowedPeers(t *testing.T) {
	for name, tc := range map[string]struct {
		peer uint32
		self int
		ok   bool
	}{
		"root to root": {0, 0, true}, "root to a user": {0, 1000, true}, "the same user": {1000, 1000, true},
		"another user": {1001, 1000, false}, "a user to root": {1000, 0, false}, "a user that this namespace has not": {65534, 0, false},
	} {
		assert.Equal(t, tc.ok, allowed(&unix.Ucred{Uid: tc.peer}, tc.self) == nil, name)
	}
}

// tokenPipe is the two ends of one, the first with a sender's packets.
func tokenPipe(t *testing.T, packets ...string) (near *net.UnixConn, far *net.UnixConn) {
	t.Helper()
	near, file, err := newTokenPipe()
	require.NoError(t, err)
	far, err = unixConn(file)
	require.NoError(t, err)
	t.Cleanup(func() { near.Close(); far.Close() })
	for _, packet := range packets {
		_, err := far.Write([]byte(packet))
		require.NoError(t, err)
	}
	return near, far
}

func TestReceiveTokens(t *testing.T) {
	failing := errors.New("malformed token")
	for name, tc := range map[string]struct {
		packets []string
		n       int
		err     string
	}{
		"none are sent":   {nil, 0, ""},
		"none in memory":  {[]string{tokensVersion}, 0, ""},
		"two":             {[]string{tokensVersion, "a", "b"}, 2, ""},
		"another version": {[]string{"nmi tokens 2", "a"}, 0, "another version"},
		"garbage":         {[]string{"220 ready"}, 0, "another version"},
		"a malformed one": {[]string{tokensVersion, "a", "bad", "b"}, 1, "malformed token"},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := tokenPipe(t, tc.packets...)
			require.NoError(t, far.Close())
			n, err := receiveTokens(t.Context(), near, func(packet []byte) error {
				if string(packet) == "bad" {
					return failing
				}
				return nil
			})
			assert.Equal(t, tc.n, n)
			if tc.err == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tc.err)
			}
		})
	}
}

func TestTransferOfTokensIsBounded(t *testing.T) {
	for size, most := range map[int]int{1: maxPackets, maxPacket: maxTransfer / maxPacket} {
		t.Run(fmt.Sprintf("packets of %d bytes", size), func(t *testing.T) {
			near, far := tokenPipe(t, tokensVersion)
			go func() {
				for {
					if _, err := far.Write(make([]byte, size)); err != nil {
						return
					}
				}
			}()
			n, err := receiveTokens(t.Context(), near, func([]byte) error { return nil })
			require.ErrorContains(t, err, "more were sent than a cache holds")
			assert.Equal(t, most, n)
		})
	}
	t.Run("a sender that hangs", func(t *testing.T) {
		t.Parallel()
		near, _ := tokenPipe(t, tokensVersion, "a")
		n, err := receiveTokens(t.Context(), near, func([]byte) error { return nil })
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		assert.Equal(t, 1, n)
	})
	t.Run("a receiver that hangs", func(t *testing.T) {
		t.Parallel()
		near, file, err := newTokenPipe()
		require.NoError(t, err)
		defer near.Close()
		err = sendTokens(t.Context(), file, func(send func([]byte) error) error {
			for {
				if err := send([]byte(strings.Repeat("t", 4096))); err != nil {
					return err
				}
			}
		})
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	})
	t.Run("the context", func(t *testing.T) {
		near, _ := tokenPipe(t, tokensVersion)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		_, err := receiveTokens(ctx, near, func([]byte) error { return nil })
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		assert.Less(t, time.Since(start), tokensTimeout)
	})
}
