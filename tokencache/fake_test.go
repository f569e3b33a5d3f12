package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache/limiter"
)

// What proxy/upstream gives its limiters and a fetch.
const (
	perSecond, atOnce = 18, 4
	fetchTimeout      = 10 * time.Second
)

func slots() *limiter.Limiter { return limiter.New(perSecond, atOnce) }

// fakeUpstream counts its calls and hands out numbered tokens.
type fakeUpstream struct {
	mu    sync.Mutex // guards all below
	calls []request
	life  time.Duration // of the tokens it gives; 0 means 24 hours
	takes time.Duration // how long a call lasts
	err   error
	// imds and entra are the limiters, for both kinds of keys; nil means none.
	imds, entra *limiter.Limiter

	out, peak int // calls under way, now and at most
}

type request struct {
	Request
	at time.Time
}

func (u *fakeUpstream) fetch(ctx context.Context, req Request) (*Token, error) {
	slots := u.imds
	if _, ok := req.FromEntra(); ok {
		slots = u.entra
	}
	if slots != nil {
		release, err := slots.Acquire(ctx, time.Now(), req.Waiting)
		var paused *limiter.PausedError
		switch {
		case errors.As(err, &paused):
			return nil, classed{Throttled, paused.For}
		case errors.Is(err, limiter.ErrTimeout):
			return nil, fmt.Errorf("%w: %w", ErrBusy, classed{Unavailable, slots.Backlog()})
		case err != nil:
			return nil, err
		}
		defer func() {
			u.mu.Lock()
			_, wait := classOf(u.err)
			u.mu.Unlock()
			release(wait)
		}()
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	u.mu.Lock()
	u.calls = append(u.calls, request{req, time.Now()})
	n, life, takes, err := len(u.calls), u.life, u.takes, u.err
	u.out++
	u.peak = max(u.peak, u.out)
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		u.out--
		u.mu.Unlock()
	}()
	// No timer for no time at all: the race detector does not survive many of those
	// at once in a bubble (go.dev/issue/78156).
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	if life == 0 {
		life = 24 * time.Hour
	}
	now := time.Now()
	return &Token{AccessToken: fmt.Sprintf("token-%d", n), Resource: req.Resource, NotBefore: now, ExpiresOn: now.Add(life).Round(0)}, nil
}

func (u *fakeUpstream) asked() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.calls)
}

func (u *fakeUpstream) fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.err = err
}

func (u *fakeUpstream) slow(takes time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.takes = takes
}

// keptItsLimits asserts that it was not asked more than IMDS may be.
func (u *fakeUpstream) keptItsLimits(t *testing.T) {
	t.Helper()
	assert.LessOrEqual(t, u.peak, atOnce)
	assert.LessOrEqual(t, u.mostInASecond(), perSecond)
}

// mostInASecond is how many calls began within the worst second.
func (u *fakeUpstream) mostInASecond() (most int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range u.calls {
		n := 0
		for _, c := range u.calls[i:] {
			if c.at.Sub(u.calls[i].at) < time.Second {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// classed is an error that says what it means.
type classed struct {
	class Class
	wait  time.Duration
}

func (e classed) Error() string       { return "the upstream said: " + e.class.String() }
func (e classed) Class() Class        { return e.class }
func (e classed) Wait() time.Duration { return e.wait }

var (
	key   = Key{ClientID: "11111111-1111-1111-1111-111111111111", Resource: "https://vault.azure.net"}
	alice = netip.MustParseAddr("10.0.0.1")
	bob   = netip.MustParseAddr("10.0.0.2")
)

func numbered(i int) Key { return Key{ClientID: key.ClientID, Resource: fmt.Sprintf("r%d", i)} }

func pod(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }

func get(t *testing.T, c *Cache) string {
	t.Helper()
	token, err := c.Get(t.Context(), key, alice)
	require.NoError(t, err)
	return token.AccessToken
}

// stored are the entries in memory, the least recently used first.
func stored(c *Cache) []*entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries.Values()
}

// made are the calls so far.
func (u *fakeUpstream) made() []request {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.calls)
}

// fetches is how many fetches were started, for any reason.
func fetches(s Stats) uint64 { return s.Fetches[Miss] + s.Fetches[Refresh] + s.Fetches[Renewal] }
