package handover

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testlog"
)

const patience = 30 * time.Second

// testAgent is as much of an agent as a takeover needs.
type testAgent struct {
	*Handover
	t     *testing.T
	log   testlog.Buffer
	front *Listener
	pages map[string]*net.TCPListener
	sends []string      // tokens
	ended chan bool     // what Offer returned
	stop  func()        // ends Offer
	acts  chan string   // "release" or "resume", as they happen
	ready chan struct{} // for Acquire

	mu       sync.Mutex // guards received
	received []string
}

func newTestAgent(t *testing.T, dir string) *testAgent {
	t.Helper()
	a := &testAgent{
		t: t, pages: make(map[string]*net.TCPListener), acts: make(chan string, 100), ready: make(chan struct{}),
	}
	a.Handover = New(dir, a.log.Logger())
	t.Cleanup(func() {
		if a.stop != nil {
			a.stop()
		}
		a.Close()
	})
	return a
}

// listens opens or inherits the agent's listeners.
func (a *testAgent) listens(front, page netip.AddrPort) {
	a.t.Helper()
	open := func(name string, at netip.AddrPort) *net.TCPListener {
		ln := a.Inherit(name, at)
		if ln == nil {
			var err error
			ln, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
			require.NoError(a.t, err)
		}
		a.t.Cleanup(func() { _ = ln.Close() })
		return ln
	}
	a.front = &Listener{TCPListener: open(FrontPort, front)}
	a.pages["prometheus-port"] = open("prometheus-port", page)
}

func (a *testAgent) restore(packet []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.received = append(a.received, string(packet))
	return nil
}

// offers runs Offer until stop.
func (a *testAgent) offers() {
	ctx, cancel := context.WithCancel(a.t.Context())
	a.ended = make(chan bool, 1)
	go func() {
		a.ended <- a.Offer(ctx, Duties{
			Front: a.front, Listeners: func() map[string]*net.TCPListener { return a.pages },
			Release: func() { a.acts <- "release" }, Resume: func() { a.acts <- "resume" },
			Tokens: func(send func([]byte) error) error {
				for _, token := range a.sends {
					if err := send([]byte(token)); err != nil {
						return err
					}
				}
				return nil
			},
		})
	}()
	a.stop = sync.OnceFunc(func() { cancel(); <-a.ended })
}

func (a *testAgent) does(want string) {
	a.t.Helper()
	select {
	case got := <-a.acts:
		require.Equal(a.t, want, got)
	case <-time.After(patience):
		require.Fail(a.t, "does nothing", "want %s; log:\n%s", want, a.log.String())
	}
}

func (a *testAgent) says(what string) {
	a.t.Helper()
	require.Eventually(a.t, func() bool { return strings.Contains(a.log.String(), what) }, patience, time.Millisecond, what)
}

var anyPort = netip.MustParseAddrPort("127.0.0.1:0")

// running is the first agent of a node, with its duties, that can be taken over from.
func running(t *testing.T, dir string, tokens ...string) *testAgent {
	t.Helper()
	a := newTestAgent(t, dir)
	a.sends = tokens
	require.NoError(t, a.Receive(t.Context()))
	a.listens(anyPort, anyPort)
	require.NoError(t, a.Acquire(t.Context(), nil, a.restore), "there is no other: it does not wait to be ready")
	a.offers()
	a.does("resume")
	require.Eventually(t, func() bool {
		_, err := os.Stat(filepath.Join(dir, handoverSocket))
		return err == nil
	}, patience, time.Millisecond)
	return a
}

func (a *testAgent) addrs() (front, page netip.AddrPort) {
	return netip.MustParseAddrPort(a.front.Addr().String()), netip.MustParseAddrPort(a.pages["prometheus-port"].Addr().String())
}

// accepts accepts at the front as a server does, and returns a value for each connection.
func (a *testAgent) accepts() <-chan struct{} {
	accepted := make(chan struct{}, 10)
	go func() {
		for {
			conn, err := a.front.Accept()
			if err != nil {
				return
			}
			conn.Close()
			accepted <- struct{}{}
		}
	}()
	a.t.Cleanup(func() { _ = a.front.Close() })
	return accepted
}

// dials connects to the address, and waits until one of the agents has accepted.
func dials(t *testing.T, at netip.AddrPort, accepted <-chan struct{}) {
	t.Helper()
	conn, err := net.Dial("tcp4", at.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	select {
	case <-accepted:
	case <-time.After(patience):
		require.Fail(t, "not accepted")
	}
}

func TestTakeover(t *testing.T) {
	dir := t.TempDir()
	old := running(t, dir, "first", strings.Repeat("x", maxPacket+1), "", "second", strings.Repeat("y", maxPacket))
	front, page := old.addrs()

	next := newTestAgent(t, dir)
	require.NoError(t, next.Receive(t.Context()))
	next.says("another agent runs on this node")
	next.listens(front, page)
	acquired := make(chan error)
	go func() { acquired <- next.Acquire(t.Context(), next.ready, next.restore) }()
	select {
	case <-acquired:
		require.Fail(t, "acquired before it was ready")
	case act := <-old.acts:
		require.Fail(t, act)
	case <-time.After(50 * time.Millisecond):
	}
	assert.Empty(t, old.Status())
	close(next.ready)
	old.does("release")
	require.NoError(t, <-acquired)
	assert.Equal(t, []string{"first", "second", strings.Repeat("y", maxPacket)}, next.received, "in order, without those that fit no packet")
	assert.Equal(t, "another agent has taken over; this one resumes if that agent exits", old.Status())
	accepted := next.accepts()
	for range 5 {
		dials(t, front, accepted)
	}

	// The third is kept out.
	third := newTestAgent(t, dir)
	require.ErrorContains(t, third.Receive(t.Context()), "another agent runs on this node, holds "+dir)

	// The new agent hears when the old one exits, and only then lets others take over.
	next.offers()
	old.stop()
	assert.Equal(t, []string{"release"}, drain(old.acts), "once more, as it exits")
	select {
	case act := <-next.acts:
		require.Fail(t, act, "the old agent still has requests")
	case <-time.After(50 * time.Millisecond):
	}
	old.Close()
	next.does("resume")
	last := newTestAgent(t, dir)
	require.Eventually(t, func() bool { return last.Receive(t.Context()) == nil }, patience, time.Millisecond)
	last.listens(front, page)
	close(last.ready)
	require.NoError(t, last.Acquire(t.Context(), last.ready, last.restore))
	next.does("release")
	assert.NotContains(t, old.log.String()+next.log.String()+last.log.String(), "first", "nothing of a token is logged")
}

func drain(acts chan string) (all []string) {
	for {
		select {
		case act := <-acts:
			all = append(all, act)
		default:
			return all
		}
	}
}

func TestNewAgentThatExitsGivesTheDutiesBack(t *testing.T) {
	dir := t.TempDir()
	old := running(t, dir)
	front, page := old.addrs()
	accepted := old.accepts()
	for range 3 {
		next := newTestAgent(t, dir)
		require.Eventually(t, func() bool { return next.Receive(t.Context()) == nil }, patience, time.Millisecond)
		next.listens(front, page)
		close(next.ready)
		require.NoError(t, next.Acquire(t.Context(), next.ready, next.restore))
		old.does("release")
		dials(t, front, next.accepts())
		_ = next.front.Close()
		next.Close()
		old.does("resume")
		assert.Empty(t, old.Status())
		dials(t, front, accepted)
	}
	assert.Contains(t, old.log.String(), "it exited after it had taken over")
}

func TestAgentWithAnotherPortDoesNotPauseTheOld(t *testing.T) {
	dir := t.TempDir()
	old := running(t, dir)
	front, page := old.addrs()
	next := newTestAgent(t, dir)
	require.NoError(t, next.Receive(t.Context()))
	next.listens(anyPort, page)
	close(next.ready)
	require.NoError(t, next.Acquire(t.Context(), next.ready, next.restore))
	old.does("release")
	assert.NotEqual(t, front.String(), next.front.Addr().String(), "not inherited")
	dials(t, front, old.accepts())
}

func TestAcquireEnds(t *testing.T) {
	dir := t.TempDir()
	old := running(t, dir)
	front, page := old.addrs()
	next := newTestAgent(t, dir)
	require.NoError(t, next.Receive(t.Context()))
	next.listens(front, page)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, next.Acquire(ctx, nil, next.restore), context.Canceled, "with its context")
	next.Close()
	old.says("it exited before it had taken over")
	assert.Empty(t, drain(old.acts))

	next = newTestAgent(t, dir)
	require.Eventually(t, func() bool { return next.Receive(t.Context()) == nil }, patience, time.Millisecond)
	next.listens(front, page)
	acquired := make(chan error)
	go func() { acquired <- next.Acquire(t.Context(), nil, next.restore) }()
	old.stop()
	require.NoError(t, <-acquired, "when the other agent is told to end, though not ready")
	assert.Equal(t, []string{"release"}, drain(old.acts), "first")
	next.offers()
	select {
	case act := <-next.acts:
		require.Fail(t, act, "the old agent still has requests")
	case <-time.After(50 * time.Millisecond):
	}
	old.Close()
	next.does("resume")
}

// Nobody stops the agent that ran before: two DaemonSets run on this node.
func TestPredecessorThatStays(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var log testlog.Buffer
		h := New(dir, log.Logger())
		h.conn, h.exited = new(net.UnixConn), make(chan struct{})
		assert.Empty(t, h.Status(), "which does not serve yet")
		began, exited := time.Now(), make(chan bool)
		go func() { exited <- h.awaitExit(t.Context()) }()
		synctest.Wait()
		assert.Contains(t, h.Status(), "two DaemonSets")
		for _, tc := range []struct {
			after time.Duration
			lines int
		}{{0, 0}, {exitPatience - time.Second, 0}, {exitPatience, 1}, {exitReminder, 1}, {exitPatience + exitReminder, 2}} {
			time.Sleep(time.Until(began.Add(tc.after)))
			synctest.Wait()
			assert.Equal(t, tc.lines, strings.Count(log.String(), "two DaemonSets"), tc.after)
		}
		close(h.exited)
		assert.True(t, <-exited)
		assert.Empty(t, h.Status())
	})
}

// One that is killed confirms nothing.
func TestAcquireEndsWithTheOtherAgent(t *testing.T) {
	dir := t.TempDir()
	old := running(t, dir)
	next := newTestAgent(t, dir)
	require.NoError(t, next.Receive(t.Context()))
	next.listens(old.addrs())
	assert.True(t, next.Succeeds())
	assert.False(t, old.Succeeds())
	acquired := make(chan error)
	go func() { acquired <- next.Acquire(t.Context(), nil, next.restore) }()
	require.NoError(t, next.conn.CloseRead()) // as the kernel does for the other end
	require.NoError(t, <-acquired)
	next.offers()
	next.does("resume")
}

// The agent that runs is told to end while it releases its duties: the new one does not wait until
// that has finished its requests.
func TestEndDuringRelease(t *testing.T) {
	dir := t.TempDir()
	old := newTestAgent(t, dir)
	require.NoError(t, old.Receive(t.Context()))
	old.listens(anyPort, anyPort)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan bool, 1)
	go func() {
		ended <- old.Offer(ctx, Duties{
			Front: old.front, Listeners: func() map[string]*net.TCPListener { return old.pages },
			Release: func() { cancel(); time.Sleep(50 * time.Millisecond) }, // until the connection's deadline is set
			Resume:  func() {}, Tokens: func(func([]byte) error) error { return nil },
		})
	}()
	next := newTestAgent(t, dir)
	require.Eventually(t, func() bool { return next.Receive(t.Context()) == nil && next.conn != nil }, patience, time.Millisecond)
	next.listens(old.addrs())
	close(next.ready)
	require.NoError(t, next.Acquire(t.Context(), next.ready, next.restore), "although old is not closed")
	<-ended
}

func TestWithoutADirectoryNobodyTakesOver(t *testing.T) {
	a := newTestAgent(t, "")
	require.NoError(t, a.Receive(t.Context()))
	a.listens(anyPort, anyPort)
	require.NoError(t, a.Acquire(t.Context(), nil, a.restore))
	a.offers()
	a.does("resume")
	a.stop()
	assert.Empty(t, drain(a.acts), "to nobody")
}

func TestDirectoryThatCannotBeUsed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "\x00")
	a := newTestAgent(t, dir)
	require.NoError(t, a.Receive(t.Context()), "no reason not to start")
	a.listens(anyPort, anyPort)
	a.offers()
	a.does("resume")
	a.says("trying again")
	assert.Contains(t, a.Status(), "no agent can take over from this one without refusing connections: ")
}

func TestManyTakeoversWithManyTokens(t *testing.T) {
	dir := t.TempDir()
	var tokens []string
	for i := range 2000 {
		tokens = append(tokens, fmt.Sprintf("%04d%s", i, strings.Repeat("t", 2000)))
	}
	a := running(t, dir, tokens...)
	front, page := a.addrs()
	for range 10 {
		next := newTestAgent(t, dir)
		require.Eventually(t, func() bool { return next.Receive(t.Context()) == nil }, patience, time.Millisecond)
		next.listens(front, page)
		close(next.ready)
		start := time.Now()
		require.NoError(t, next.Acquire(t.Context(), next.ready, next.restore))
		took := time.Since(start)
		require.Len(t, next.received, len(tokens))
		require.True(t, slices.Equal(tokens, next.received))
		t.Logf("acquired with %d tokens in %s", len(next.received), took)
		next.sends = next.received
		next.offers()
		a.stop()
		a.Close()
		next.does("resume")
		a = next
	}
}
