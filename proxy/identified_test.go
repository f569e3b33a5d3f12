package proxy

import (
	"net"
	"net/http"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
)

// Where the kernel names the pod, its address means nothing: what it gets, its bounds, and what is
// said of it go by the pod.
func TestCallersByUID(t *testing.T) {
	var cfg Config
	w := newWorld(t, func(c *Config) {
		c.Pods = runResolver(t, podresolver.Config{ByUID: true, Logger: c.Logger})
		cfg = *c
	})
	uids := map[netip.Addr]string{ // by the address that a test's connection comes from
		netip.MustParseAddr(alsoBound): "uid-of-bound",
		netip.MustParseAddr(unbound):   "uid-of-bound",
		netip.MustParseAddr(bound):     "uid-of-unbound",
		netip.MustParseAddr(excepted):  "nobody",
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w.stop() // the one of newWorld
	w.running.Wait()
	w.serveOn(listener.OnlyIdentified(ln, func(c *net.TCPConn) (netip.Addr, error) {
		return podresolver.ByUID(uids[c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()]), nil
	}), cfg)

	for range 3 { // from IMDS, from memory by http.Server, and on the fast path
		for _, from := range []string{alsoBound, unbound} {
			resp, body := w.get(from, tokenURL)
			assert.Equal(t, http.StatusOK, resp.StatusCode, body)
			assert.Equal(t, one.ClientID, tokenSubject(body))
		}
	}
	resp, body := w.get(bound, tokenURL)
	assert.Equal(t, http.StatusBadRequest, resp.StatusCode, body)
	resp, body = w.get(excepted, tokenURL)
	assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode, body)
	assert.Contains(t, w.log.String(), "UID nobody")
	assert.Contains(t, w.log.String(), "from="+excepted+":")
	assert.NotContains(t, w.log.String(), "from=[::%", "what stands for the pod's UID")
	assert.Equal(t, 1, w.imds.Tokens())
	refusals := w.server.Refusals(podresolver.ByUID("uid-of-unbound"))
	require.Len(t, refusals, 1)
	assert.Equal(t, "shop/unbound", refusals[0].Pod)
	assert.Empty(t, w.server.Refusals(netip.MustParseAddr(bound)))
}
