package main

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAShutGateLeavesWhatComesToOthers(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	g := &gate{TCPListener: ln.(*net.TCPListener)}
	came := make(chan error)
	go func() {
		for {
			conn, err := g.Accept()
			if err == nil {
				conn.Close()
			}
			came <- err
			if err != nil {
				return
			}
		}
	}()
	dial := func() {
		t.Helper()
		conn, err := net.Dial("tcp4", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
	}
	dial()
	require.NoError(t, <-came)
	let := func() bool {
		select {
		case err := <-came:
			require.NoError(t, err)
			return true
		case <-time.After(20 * time.Millisecond):
			return false
		}
	}
	for range 3 {
		g.shut()
		dial()
		if let() { // an Accept under way may let one more in
			dial()
			require.False(t, let(), "accepted, although it is shut")
		}
		g.open()
		require.NoError(t, <-came, "what waited is let in")
	}
	g.shut()
	require.NoError(t, g.Close())
	assert.ErrorIs(t, <-came, net.ErrClosed)
}

func TestAUnixSocketTakesThePlaceOfWhateverHasItsName(t *testing.T) {
	path := t.TempDir() + "/socket"
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	for range 2 { // the second replaces the first, which still listens
		ln, err := listenUnix(t.Context(), "unix", path)
		require.NoError(t, err)
		defer ln.Close()
		info, err := os.Stat(path)
		require.NoError(t, err)
		assert.Equal(t, os.ModeSocket|0o600, info.Mode())
		conn, err := net.Dial("unix", path)
		require.NoError(t, err)
		defer conn.Close()
		accepted, err := ln.Accept()
		require.NoError(t, err)
		defer accepted.Close()
	}
}

func TestNoMultipathTCP(t *testing.T) {
	ln, err := listen(t.Context(), endpoint{flagPrometheusPort, netip.MustParseAddrPort("127.0.0.1:0")})
	require.NoError(t, err)
	defer ln.Close()
	var d net.Dialer
	d.SetMultipathTCP(true)
	client, err := d.DialContext(t.Context(), "tcp4", ln.Addr().String())
	require.NoError(t, err)
	defer client.Close()
	conn, err := ln.AcceptTCP()
	require.NoError(t, err)
	defer conn.Close()
	multipath, err := conn.MultipathTCP()
	require.NoError(t, err)
	assert.False(t, multipath)
}
