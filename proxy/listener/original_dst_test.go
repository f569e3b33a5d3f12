package listener

import (
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// What is not redirected is reset: nothing is left of it on either side.
func TestOnlyRedirectedResetsOthers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.2:0") // not loopback's first, which is the node's own
	require.NoError(t, err)
	only := OnlyRedirected(ln, netip.MustParseAddrPort("169.254.169.254:80"))
	defer only.Close()
	go func() { _, _ = only.Accept() }()
	for range 100 {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err == nil { // or reset before that returns
			_, err = c.Read(make([]byte, 1))
			_ = c.Close()
		}
		require.ErrorContains(t, err, "connection reset")
	}
}
