package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/listener"
)

// ask sends a token request over an open connection, and returns the answer's status.
func (c *keptAlive) ask(t *testing.T) int {
	t.Helper()
	return c.answer(t).StatusCode
}

// answer is ask's, whose body has been read.
func (c *keptAlive) answer(t *testing.T) *http.Response {
	t.Helper()
	_, err := io.WriteString(c, "GET "+tokenURL+" HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n")
	require.NoError(t, err)
	resp, err := http.ReadResponse(c.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	require.NoError(t, err)
	return resp
}

// ended waits until the other side has closed the connection.
func (c *keptAlive) ended(t *testing.T) bool {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
	_, err := c.r.ReadByte()
	var timeout net.Error
	return err != nil && (!errors.As(err, &timeout) || !timeout.Timeout())
}

// stats are those of connections, but for how many are busy, which is a matter of time.
func (w *world) stats() listener.Stats {
	stats := w.server.Stats().Connections
	stats.Busy = 0
	return stats
}

func (w *world) waitForOpen(open int) {
	w.t.Helper()
	w.eventually(func() bool { return w.server.Stats().Connections.Open == open }, "%d connections", open)
}

// waitForIdle waits until the server has so many idle connections, which is some time after it has
// answered on them.
func (w *world) waitForIdle(n int) {
	w.t.Helper()
	w.eventually(func() bool { stats := w.server.Stats().Connections; return stats.Open-stats.Busy == n }, "%d idle connections", n)
}

func TestIdleConnectionIsEvictedForSamePod(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxConnectionsPerPod, c.MaxConnections = 3, 100 })
	others := w.connect(alsoBound)
	require.Equal(t, 200, others.ask(t))
	var own []*keptAlive
	for i := range 3 {
		c := w.connect(bound)
		require.Equal(t, 200, c.ask(t))
		w.waitForIdle(i + 2) // with the others'
		own = append(own, c)
	}
	w.waitForOpen(4)
	require.Equal(t, 200, own[0].ask(t)) // now the second has been idle longest
	w.waitForIdle(4)
	fourth := w.connect(bound)
	assert.True(t, own[1].ended(t))
	for _, c := range []*keptAlive{own[0], own[2], fourth, others} {
		assert.Equal(t, 200, c.ask(t))
	}
	assert.Equal(t, listener.Stats{Open: 4, Evicted: 1}, w.stats())
}

func TestBusyConnectionIsNotEvictedForSamePod(t *testing.T) {
	imds := newHeldIMDS()
	w := newWorld(t, func(c *Config) { c.Upstream = imds; c.MaxConnectionsPerPod = 1 })
	busy := w.connect(bound)
	_, err := io.WriteString(busy, "GET /metadata/versions HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n")
	require.NoError(t, err)
	w.waitForIMDS(imds, 1)
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(bound)}}
	if second, err := dialer.DialContext(t.Context(), "tcp", w.addr); err == nil { // or reset before that returns
		assert.True(t, (&keptAlive{second, bufio.NewReader(second)}).ended(t), "there is no place")
	}
	assert.Equal(t, 200, w.connect(alsoBound).ask(t))
	close(imds.release)
	resp, err := http.ReadResponse(busy.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, uint64(1), w.server.Stats().Connections.Refused)
}

func TestPodWithMostConnectionsLosesAnIdleOne(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxConnectionsPerPod, c.MaxConnections = 10, 6 })
	var greedy []*keptAlive
	for range 5 {
		greedy = append(greedy, w.connect(unbound)) // and says nothing
	}
	modest := w.connect(bound)
	require.Equal(t, 200, modest.ask(t))
	w.waitForOpen(6)
	late := w.connect(alsoBound)
	assert.Equal(t, 200, late.ask(t))
	assert.True(t, greedy[0].ended(t))
	assert.Equal(t, 200, modest.ask(t))
	assert.Equal(t, listener.Stats{Open: 6, Evicted: 1}, w.stats())
}

// stuckIMDS answers no request until the request's context ends, or the test.
type stuckIMDS struct{ asked, canceled, testEnds chan struct{} }

func newStuckIMDS(t *testing.T) stuckIMDS {
	t.Helper()
	imds := stuckIMDS{make(chan struct{}, 10), make(chan struct{}, 10), make(chan struct{})}
	t.Cleanup(func() { close(imds.testEnds) })
	return imds
}

func (s stuckIMDS) RoundTrip(r *http.Request) (*http.Response, error) {
	s.asked <- struct{}{}
	select {
	case <-r.Context().Done():
		s.canceled <- struct{}{}
		return nil, r.Context().Err()
	case <-s.testEnds:
		return nil, errors.New("the test has ended")
	}
}

func TestPodWithMostConnectionsLosesABusyOne(t *testing.T) {
	imds := newStuckIMDS(t)
	w := newWorld(t, func(c *Config) { c.Upstream = imds; c.MaxConnectionsPerPod, c.MaxConnections = 10, 5 })
	hold := func(from string) *keptAlive {
		c := w.connect(from)
		_, err := io.WriteString(c, "GET /metadata/versions HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n")
		require.NoError(t, err)
		<-imds.asked
		return c
	}
	greedy := []*keptAlive{hold(unbound), hold(unbound), hold(unbound)}
	hold(bound)
	hold(bound)
	late := w.connect(alsoBound)
	assert.Equal(t, 200, late.ask(t))
	assert.True(t, greedy[0].ended(t), "the one that has been in use longest")
	<-imds.canceled
	assert.Equal(t, listener.Stats{Open: 5, Evicted: 1}, w.stats())

	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(bound)}}
	if third, err := dialer.DialContext(t.Context(), "tcp", w.addr); err == nil { // or reset before that returns
		assert.True(t, (&keptAlive{third, bufio.NewReader(third)}).ended(t), "it would have more than any")
	}
	assert.Equal(t, listener.Stats{Open: 5, Evicted: 1, Refused: 1}, w.stats())
	assert.Equal(t, 200, late.ask(t))
}

// A pod that opens thousands of connections and says nothing holds as many as it may.
func TestManySilentConnections(t *testing.T) {
	w := newWorld(t, nil)
	modest := w.connect(bound)
	require.Equal(t, 200, modest.ask(t))
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(unbound)}}
	for range 2_000 {
		c, err := dialer.DialContext(t.Context(), "tcp", w.addr)
		if err != nil { // or reset later: while its connections are held back, it gets no new ones
			require.ErrorIs(t, err, syscall.ECONNRESET)
			continue
		}
		defer c.Close()
		if tcp, ok := c.(*net.TCPConn); ok {
			require.NoError(t, tcp.SetLinger(0))
		}
	}
	assert.LessOrEqual(t, w.server.Stats().Connections.Open, DefaultMaxConnectionsPerPod+1)
	assert.Equal(t, 200, modest.ask(t))
	assert.Equal(t, 200, w.connect(alsoBound).ask(t))
}

// An evicted connection's request is canceled, although http.Server does not notice the end: it
// looks out for that only as long as the client sends nothing more.
func TestEvictionCancelsTheRequest(t *testing.T) {
	imds := newStuckIMDS(t)
	w := newWorld(t, func(c *Config) { c.Upstream, c.MaxConnections = imds, 2 })
	for range 2 {
		c := w.connect(unbound)
		_, err := io.WriteString(c, "GET /metadata/versions HTTP/1.1\r\nHost: h\r\n\r\nG")
		require.NoError(t, err)
		<-imds.asked
	}
	assert.Empty(t, imds.canceled)
	w.connect(bound) // evicts one of the pod that has two
	<-imds.canceled
}
