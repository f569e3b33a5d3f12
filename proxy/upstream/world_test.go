package upstream

import (
	"context"
	"net"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

var (
	known = imdstest.Identity{ClientID: "c1d2e3f4-0000-4000-8000-000000000001", ResourceID: "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/one"}
	key   = tokencache.Key{ClientID: known.ClientID, Resource: "https://vault.azure.net/"}
)

// closedAddr is an address without a listener. A port that was just closed may soon have
// another one.
const closedAddr = "127.0.0.1:1"

// asking is a request of one pod, which waits for a minute.
func asking(k tokencache.Key) tokencache.Request {
	until := time.Now().Add(time.Minute)
	return tokencache.Request{Key: k, Waiting: func() ([]netip.Addr, time.Time) { return []netip.Addr{podAddr(0)}, until }}
}

// countedLimiter counts the slots that it gives out.
type countedLimiter struct {
	*limiter.Limiter
	delay time.Duration // before each
	err   error         // instead of one
	after int           // slots that are given out before err

	mu            sync.Mutex // guards all following fields
	acquired, out int
}

// counted makes an upstream's fetches from IMDS take counted slots.
func counted(u *Upstream) *countedLimiter {
	l := &countedLimiter{Limiter: limiter.New(1000, 1000)}
	u.imdsLimiter = l
	return l
}

func (l *countedLimiter) Acquire(ctx context.Context, since time.Time, waiting func() ([]netip.Addr, time.Time)) (func(time.Duration), error) {
	if err := pause(ctx, l.delay); err != nil {
		return nil, err
	}
	l.mu.Lock()
	if l.err != nil && l.acquired == l.after {
		defer l.mu.Unlock()
		return nil, l.err
	}
	l.mu.Unlock()
	release, err := l.Limiter.Acquire(ctx, since, waiting)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acquired++
	l.out++
	return func(retryAfter time.Duration) {
		release(retryAfter)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.out--
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

// check asserts that every request had its own slot, and released it once.
func (l *countedLimiter) check(t *testing.T, requests int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	assert.Equal(t, requests, l.acquired, "one slot for each request")
	assert.Zero(t, l.out, "each is released once")
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
