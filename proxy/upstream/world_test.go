package upstream

import (
	"context"
	"net"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

var (
	known = imdstest.Identity{ClientID: "c1d2e3f4-0000-4000-8000-000000000001", ResourceID: "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/one"}
	key   = tokencache.Key{ClientID: known.ClientID, Resource: "https://vault.azure.net/"}
)

// nobody is an address that nobody listens at, where a port that was let go of may be
// somebody else's soon.
const nobody = "127.0.0.1:1"

// asking is a request that never has to wait for its turn.
func asking(k tokencache.Key) tokencache.Request {
	return tokencache.Request{Key: k, Turn: new(turns).take}
}

// turns gives a turn to whoever asks, and remembers them.
type turns struct {
	wait time.Duration // before each

	mu         sync.Mutex // guards all below
	taken      int
	out        int             // not given back
	leaveAlone []time.Duration // what each was given back with
}

func (l *turns) take(ctx context.Context) (done func(time.Duration), err error) {
	if err := pause(ctx, l.wait); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken++
	l.out++
	return func(d time.Duration) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.out--
		l.leaveAlone = append(l.leaveAlone, d)
	}, nil
}

// pause waits on the clock of a test's bubble, for no time at all without a timer: the
// race detector does not survive many of those at once there (go.dev/issue/78156).
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(d):
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// check says that every request had its own turn, and gave it back once.
func (l *turns) check(t *testing.T, requests int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	assert.Equal(t, requests, l.taken, "one turn for each request")
	assert.Zero(t, l.out, "turns not given back")
	assert.Len(t, l.leaveAlone, l.taken, "each is given back once")
}

func upstreamOf(t *testing.T, srv *httptest.Server) *Upstream {
	t.Helper()
	t.Cleanup(srv.Close)
	base, err := url.Parse(srv.URL)
	require.NoError(t, err)
	u := New(Config{IMDS: base, UserAgent: "nmi/test"})
	t.Cleanup(u.Close)
	return u
}

// pipes is a listener whose connections are in memory, so that a bubble's clock
// governs them.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes"} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// inMemory serves on connections in memory, until the test ends.
func inMemory(t *testing.T, imds *imdstest.Server) (u *Upstream, stop func()) {
	t.Helper()
	ln := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	stopServing := imds.Serve(ln)
	u = New(Config{IMDS: &url.URL{Scheme: "http", Host: "imds.test"}, UserAgent: "nmi/test"})
	u.transport.DialContext = ln.dial
	return u, func() {
		u.Close()
		stopServing()
	}
}
