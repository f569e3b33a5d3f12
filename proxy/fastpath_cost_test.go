package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
)

// An idle connection costs little. (With the race detector stacks are larger.)
func TestMemoryOfIdleConnections(t *testing.T) {
	const n, most = 200, 14 << 10
	w := newWorld(t, func(c *Config) { c.MaxConnectionsPerPod = n })
	before := usedMemory()
	conns := make([]net.Conn, n)
	response := bufio.NewReader(nil)
	for i := range conns {
		c := w.connect(bound)
		for range 3 {
			_, err := io.WriteString(c, get(tokenURL))
			require.NoError(t, err)
			response.Reset(c)
			resp, err := http.ReadResponse(response, nil)
			require.NoError(t, err)
			_, _ = io.Copy(io.Discard, resp.Body)
		}
		conns[i] = c.Conn
	}
	w.waitForIdle(n)
	each := (usedMemory() - before) / n
	t.Logf("%d bytes each, the clients' part included", each)
	assert.Less(t, each, int64(most))
}

// fastConn is a connection from a bound pod whose client takes everything.
type fastConn struct{ net.Conn }

func (fastConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(bound), 40000))
}
func (fastConn) Write(b []byte) (int, error)      { return len(b), nil }
func (fastConn) SetWriteDeadline(time.Time) error { return nil }

type fastListener struct{ net.Listener }

func (fastListener) Accept() (net.Conn, error) {
	conn, _ := net.Pipe()
	return fastConn{conn}, nil
}

// knownRequest returns a server, a connection to it, and a known head that asks for a token which
// is in memory.
func knownRequest(tb testing.TB) (s *Server, c *listener.Conn, head *knownHead) {
	tb.Helper()
	s, _, _ = cached(tb)
	s.cfg.CheckSource = func(netip.Addr, int, *podresolver.Pod) error { return nil }
	accepted, err := s.conns.Listener(fastListener{}).Accept()
	require.NoError(tb, err)
	c, ok := accepted.(*listener.Conn)
	require.True(tb, ok)
	raw := withID(1)
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
	require.NoError(tb, err)
	req, err := parseTokenRequest(r, queryRules{})
	require.NoError(tb, err)
	head = newKnownHead([]byte(raw), r, req)
	require.NotNil(tb, head)
	return s, c, head
}

// answersFast returns a function that answers a request with a known head, for a token that is
// in memory.
func answersFast(tb testing.TB) (answer func()) {
	tb.Helper()
	s, c, head := knownRequest(tb)
	request := []byte(withID(2))
	arrived := time.Now()
	return func() {
		if !head.matches(request) {
			tb.Fatal("another head")
		}
		a, ok := s.tokenInMemory(c, head.req)
		if !ok || s.respond(c, a.token, false, a.at) != nil {
			tb.Fatal("not answered")
		}
		s.requests.recordHit(a.source, time.Since(arrived))
	}
}

func TestFastPathAllocations(t *testing.T) {
	assert.Zero(t, testing.AllocsPerRun(1000, answersFast(t)))
}

// BenchmarkFastPath is a cached token from a known head to the response, without the network.
func BenchmarkFastPath(b *testing.B) {
	answer := answersFast(b)
	b.ReportAllocs()
	for b.Loop() {
		answer()
	}
}

// BenchmarkTokenInMemory is what the agent itself does for a cached token: it resolves the caller,
// decides, looks the token up, and formats it. Heads, connections and the network are left out.
func BenchmarkTokenInMemory(b *testing.B) {
	s, c, head := knownRequest(b)
	buffer := make([]byte, 0, maxBuffer)
	b.ReportAllocs()
	for b.Loop() {
		a, ok := s.tokenInMemory(c, head.req)
		if !ok {
			b.Fatal("not answered")
		}
		buffer = appendToken(buffer[:0], a.token, a.at)
	}
}
