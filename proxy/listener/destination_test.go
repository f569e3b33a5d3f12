package listener

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Nothing is heard at other addresses than those that are meant, by whichever process has the listener.
func TestOnlyTo(t *testing.T) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // its sockets have no filters (mptcp_setsockopt_sol_socket)
	all, err := lc.Listen(t.Context(), "tcp4", "0.0.0.0:0")
	require.NoError(t, err)
	defer all.Close()
	ln := all.(*net.TCPListener)
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	answers := func(to string) bool {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(netip.MustParseAddr(to), port).String(), 300*time.Millisecond)
		if err != nil {
			assert.ErrorContains(t, err, "timeout", "dropped, not refused")
			return false
		}
		defer c.Close()
		accepted, err := ln.Accept()
		require.NoError(t, err)
		defer accepted.Close()
		_, err = accepted.Write([]byte("x"))
		require.NoError(t, err)
		_, err = c.Read(make([]byte, 1))
		require.NoError(t, err)
		return true
	}
	first, second := netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.1")
	require.True(t, answers("127.0.0.3"))
	require.NoError(t, OnlyTo(ln, first))
	assert.True(t, answers("127.0.0.2"))
	assert.False(t, answers("127.0.0.1"))
	require.NoError(t, OnlyTo(ln, first, second))
	assert.True(t, answers("127.0.0.1"))
	assert.True(t, answers("127.0.0.2"))
	assert.False(t, answers("127.0.0.3"))
	require.NoError(t, OnlyTo(ln))
	assert.True(t, answers("127.0.0.3"))
	require.NoError(t, OnlyTo(ln), "again")
}
