package proxy

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDrainingClosesConnectionsWithTheNextResponse(t *testing.T) {
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
	w.server.SetDraining(true)
	assert.True(t, ask(first), "it says so")
	_, err := first.r.ReadByte()
	require.ErrorIs(t, err, io.EOF, "and does so")

	w.server.SetDraining(false)
	assert.False(t, ask(second))
}

func TestIdleConnectionHasOneMoreRequestOnStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		s, ln, served := New(Config{Logger: slog.New(slog.DiscardHandler)}), newPipes(), make(chan error, 1)
		go func() { served <- s.Serve(ctx, ln) }()
		pod := ln.dial(bound)
		defer pod.Close()
		c := &keptAlive{pod, bufio.NewReader(pod)}
		ask := func() (last bool) {
			t.Helper()
			c.write(t, "GET "+tokenURL+" HTTP/1.1\r\nHost: imds\r\n\r\n") // without Metadata, which is refused
			resp, err := http.ReadResponse(c.r, nil)
			require.NoError(t, err)
			defer resp.Body.Close()
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
			assert.Equal(t, 400, resp.StatusCode)
			return resp.Close
		}
		assert.False(t, ask())
		stop()
		stopped := time.Now()
		time.Sleep(lingerTimeout - time.Millisecond)
		s.SetDraining(false) // as when another agent exits just now
		assert.True(t, ask())
		require.NoError(t, <-served)
		assert.Less(t, time.Since(stopped), lingerTimeout, "it waits, although all connections are closed")
	})
}

func TestDrainingBeginsDuringARequest(t *testing.T) {
	imds := newHeldIMDS()
	w := newWorld(t, func(c *Config) { c.Upstream = imds })
	conn := w.connect(unbound)
	_, err := io.WriteString(conn, "GET /metadata/versions HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n")
	require.NoError(t, err)
	w.waitForIMDS(imds, 1)
	w.server.SetDraining(true)
	close(imds.release)
	resp, err := http.ReadResponse(conn.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.True(t, resp.Close, "draining began after the request, and before the response")
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

func TestServeDrains(t *testing.T) {
	imds := newHeldIMDS()
	w := newWorld(t, func(c *Config) { c.Upstream = imds })
	answered := make(chan int, 1)
	go func() {
		resp, _ := w.get(unbound, "/metadata/versions")
		answered <- resp.StatusCode
	}()
	w.waitForIMDS(imds, 1)
	w.stop()
	w.eventually(func() bool {
		conn, err := net.Dial("tcp", w.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	}, "the listener is closed")
	assert.Empty(t, answered)
	close(imds.release)
	assert.Equal(t, 200, <-answered)
	w.running.Wait() // Serve has returned nil, which newWorld checks
}
