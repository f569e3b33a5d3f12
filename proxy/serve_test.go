package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestARetiredServerClosesEachConnectionWithItsNextAnswer(t *testing.T) {
	w := newWorld(t, nil)
	ask := func(c *keptAlive) (last bool) {
		t.Helper()
		resp := c.answer(t)
		assert.Equal(t, 200, resp.StatusCode)
		return resp.Close
	}
	first, second := w.connect(bound), w.connect(bound)
	assert.False(t, ask(first))
	assert.False(t, ask(second))
	w.server.Retire(true)
	assert.True(t, ask(first), "it says so")
	_, err := first.r.ReadByte()
	require.ErrorIs(t, err, io.EOF, "and does so")

	w.server.Retire(false)
	assert.False(t, ask(second))

	w.stop() // which retires it
	assert.True(t, ask(second), "a connection that was idle when the server was told to stop is of use once more")
	ended := make(chan struct{})
	go func() { w.running.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(2 * time.Second):
		t.Fatal("waits, although all connections are closed")
	}
}

func TestAnAnswerThatTookLongEndsItsConnectionToo(t *testing.T) {
	imds := blockingIMDS{asked: make(chan struct{}), release: make(chan struct{})}
	w := newWorld(t, func(c *Config) { c.Upstream = imds })
	conn := w.connect(unbound)
	_, err := io.WriteString(conn, "GET /metadata/versions HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n")
	require.NoError(t, err)
	<-imds.asked
	w.server.Retire(true)
	close(imds.release)
	resp, err := http.ReadResponse(conn.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.True(t, resp.Close, "retired after it was asked, and before it answered")
}

type keptAlive struct {
	net.Conn
	r *bufio.Reader
}

func (w *world) connect(from string) *keptAlive {
	w.t.Helper()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
	conn, err := dialer.DialContext(w.t.Context(), "tcp", w.addr)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = conn.Close() })
	return &keptAlive{conn, bufio.NewReader(conn)}
}

func TestServeFinishesWhatItBeganAndTakesNoMore(t *testing.T) {
	imds := blockingIMDS{asked: make(chan struct{}), release: make(chan struct{})}
	w := newWorld(t, func(c *Config) { c.Upstream = imds })
	answered := make(chan int, 1)
	go func() {
		resp, _ := w.get(unbound, "/metadata/versions")
		answered <- resp.StatusCode
	}()
	<-imds.asked
	w.stop()
	assert.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", w.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	}, 5*time.Second, time.Millisecond, "the listener is closed")
	assert.Empty(t, answered)
	close(imds.release)
	assert.Equal(t, 200, <-answered)
	w.running.Wait() // Serve has returned nil, which newWorld checks
}
