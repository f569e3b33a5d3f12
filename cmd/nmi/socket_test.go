package main

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestProbeSocketIsForRootAlone(t *testing.T) {
	path := t.TempDir() + "/socket"
	require.NoError(t, os.WriteFile(path, nil, 0o600)) // what a container left
	ln, err := listenUnix(t.Context(), path)
	require.NoError(t, err)
	defer ln.Close()
	info, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, os.ModeSocket|0o600, info.Mode())
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
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
