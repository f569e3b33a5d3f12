package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPageRetriesWithBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var mu sync.Mutex // guards attempts
		var attempts []time.Duration
		start := time.Now()
		taken := errors.New("port 9090 is taken")
		p := newPage("prometheus-port", slog.New(slog.NewTextHandler(&log, nil)), func(context.Context) (pageListener, error) {
			mu.Lock()
			defer mu.Unlock()
			attempts = append(attempts, time.Since(start))
			return nil, taken
		})
		running := &component{run: p.run}
		running.Start(t.Context())
		tried := func() []time.Duration {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(attempts)
		}
		time.Sleep(200 * time.Second)
		assert.Equal(t, []time.Duration{0, 1e9, 3e9, 7e9, 15e9, 31e9, 63e9, 123e9, 183e9}, tried())
		assert.Equal(t, "--prometheus-port cannot be served; trying again: port 9090 is taken", p.status())
		assert.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
		p.retryNow()
		assert.Len(t, tried(), 10)
		time.Sleep(time.Second)
		assert.Len(t, tried(), 11, "the pauses start over")
		running.Stop()
	})
}

func TestPageIsServedWhenItsPortIsFree(t *testing.T) {
	other, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	at := endpoint{flagPrometheusPort, netip.MustParseAddrPort(other.Addr().String())}
	p := newPortPage(at, slog.New(slog.DiscardHandler))
	p.handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "page") })
	running := &component{run: p.run}
	running.Start(t.Context())
	t.Cleanup(func() { running.Stop(); p.close() })
	require.Eventually(t, func() bool { return strings.Contains(p.status(), "is taken") }, 30*time.Second, time.Millisecond)
	assert.Nil(t, p.tcpListener(), "nothing to hand over")
	require.NoError(t, other.Close())
	p.retryNow()
	require.Eventually(t, func() bool { return p.status() == "" }, 30*time.Second, time.Millisecond)
	ask := func() string {
		resp, err := http.Get("http://" + at.addr.String())
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return string(body)
	}
	assert.Equal(t, "page", ask())
	for range 20 { // as when a successor comes and goes
		running.Stop()
		assert.NotNil(t, p.tcpListener(), "still open")
		running.Start(t.Context())
		assert.Equal(t, "page", ask())
	}
}

func TestListenOnAForeignAddress(t *testing.T) {
	_, err := listen(t.Context(), endpoint{flagPrometheusPort, netip.MustParseAddrPort("192.0.2.1:9090")})
	assert.EqualError(t, err, "192.0.2.1 is not an address of this node: choose one that is, or 0.0.0.0 for all")
	ln, err := listen(t.Context(), endpoint{flagPrometheusPort, netip.MustParseAddrPort("127.0.0.1:0")})
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}
