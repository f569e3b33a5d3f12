package listener

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A connection is that of the caller that it is identified as, not of its address; one without a
// caller is reset.
func TestOnlyIdentified(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.2:0") // not loopback's first, which is the node's own
	require.NoError(t, err)
	caller := netip.IPv6Unspecified().WithZone("a")
	var last *net.TCPConn
	l := NewLimiter(8, 8)
	only := l.Listener(OnlyIdentified(ln, func(c *net.TCPConn) (netip.Addr, error) {
		last = c
		if addrOf(c.RemoteAddr()) == netip.MustParseAddr("127.0.0.3") {
			return netip.Addr{}, errors.New("unknown")
		}
		return caller, nil
	}))
	defer only.Close()
	dial := func(from string) net.Conn {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext(t.Context(), "tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	unknown := dial("127.0.0.3")
	known := dial("127.0.0.4")
	accepted, err := only.Accept()
	require.NoError(t, err)
	c := accepted.(*Conn)
	assert.Equal(t, caller, c.Caller())
	assert.Equal(t, last, c.Conn.(*identifiedConn).TCPConn)
	assert.False(t, c.Loopback())
	port := known.LocalAddr().(*net.TCPAddr).AddrPort().Port()
	assert.Equal(t, netip.AddrPortFrom(caller, port).String(), c.RemoteAddr().String())
	assert.Equal(t, caller, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr(), "as handlers read it")
	assert.Equal(t, known.LocalAddr().String(), c.Peer().String(), "for logs")
	assert.NotZero(t, c.Ingress())
	_, err = unknown.Read(make([]byte, 1))
	require.ErrorContains(t, err, "connection reset")
	require.NoError(t, c.Close())
}
