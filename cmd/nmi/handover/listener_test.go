package handover

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPausedListener(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	l := &Listener{TCPListener: ln.(*net.TCPListener)}
	accepted := make(chan error)
	go func() {
		for {
			conn, err := l.Accept()
			if err == nil {
				conn.Close()
			}
			accepted <- err
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
	require.NoError(t, <-accepted)
	accepts := func() bool {
		select {
		case err := <-accepted:
			require.NoError(t, err)
			return true
		case <-time.After(20 * time.Millisecond):
			return false
		}
	}
	for range 3 {
		l.pause()
		dial()
		if accepts() { // an Accept under way may let one more in
			dial()
			require.False(t, accepts(), "accepted, although it is paused")
		}
		l.resume()
		require.NoError(t, <-accepted, "connections that waited are accepted")
	}
	l.pause()
	require.NoError(t, l.Close())
	assert.ErrorIs(t, <-accepted, net.ErrClosed)
}

func TestListenUnixReplacesWhatHasTheName(t *testing.T) {
	path := t.TempDir() + "/socket"
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	for range 2 { // the second replaces the first, which still listens
		ln, err := listenUnix(t.Context(), path)
		require.NoError(t, err)
		defer ln.Close()
		info, err := os.Stat(path)
		require.NoError(t, err)
		assert.Equal(t, os.ModeSocket|0o600, info.Mode())
		conn, err := net.Dial("unixpacket", path)
		require.NoError(t, err)
		defer conn.Close()
		accepted, err := ln.Accept()
		require.NoError(t, err)
		defer accepted.Close()
	}
}
