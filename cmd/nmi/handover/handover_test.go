package handover

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testlog"
)

const patience = 30 * time.Second

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
