package proxy

import (
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
)

// connTo is a connection of a bound pod that the fast path can serve, whose client takes
// everything, and the request that is known on it.
type connTo struct {
	net.Conn
	from netip.Addr
}

func (c connTo) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, 40000))
}
func (c connTo) Write(b []byte) (int, error)      { return len(b), nil }
func (c connTo) SetWriteDeadline(time.Time) error { return nil }

type oneListener struct {
	net.Listener
	conn net.Conn
}

func (l oneListener) Accept() (net.Conn, error) { return l.conn, nil }

// fastPathConn returns a connection whose requests for a cached token have a known head.
func fastPathConn(tb testing.TB, s *Server) (*listener.Conn, *knownHead) {
	tb.Helper()
	pipe, _ := net.Pipe()
	c, err := s.conns.Listener(oneListener{conn: connTo{pipe, netip.MustParseAddr(bound)}}).Accept()
	require.NoError(tb, err)
	return c.(*listener.Conn), &knownHead{before: get(tokenURL), req: tokenRequest{resource: "https://vault.azure.net/"}}
}

func (s *Server) answerFast(c *listener.Conn, head *knownHead, request []byte) bool {
	if !head.matches(request) {
		return false
	}
	token := s.tokenInMemory(c, head.req)
	return token != nil && s.respond(c, token, false) == nil
}

func TestFastPathAllocations(t *testing.T) {
	s, _, _ := cached(t)
	s.cfg.CheckSource = func(netip.Addr, int, *podresolver.Pod) error { return nil }
	c, head := fastPathConn(t, s)
	request := []byte(head.before)
	assert.Zero(t, testing.AllocsPerRun(1000, func() { require.True(t, s.answerFast(c, head, request)) }))
}

// BenchmarkFastPath is a cached token from a known head to the response, without the network.
func BenchmarkFastPath(b *testing.B) {
	s, _, _ := cached(b)
	s.cfg.CheckSource = func(netip.Addr, int, *podresolver.Pod) error { return nil }
	c, head := fastPathConn(b, s)
	request := []byte(head.before)
	b.ReportAllocs()
	for b.Loop() {
		if !s.answerFast(c, head, request) {
			b.Fatal("not answered")
		}
	}
}

var _ = http.MethodGet
