package tokencache

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/sync/singleflight"
)

// DefaultSize is 250 pods with eight resources each. At 2 to 4 KB a token that is 8 MB at
// most.
const DefaultSize = 2000

const (
	// refreshWait is how long a caller waits for a refresh while the old token is still
	// valid.
	refreshWait = time.Second
	// renewPause is the least time between two renewals of a key.
	renewPause = 5 * time.Second
	// maxKey bounds the memory of a key, in bytes: the pod chooses the resource, and
	// no real one is longer than a few hundred.
	maxKey = 2048
)

var (
	// ErrClosed is returned once the cache is closed and the token is not in memory.
	ErrClosed = errors.New("token cache is closed")
	// ErrKeyTooLong is returned for a key that no upstream would know.
	ErrKeyTooLong = errors.New("resource or identity ID is too long")
	// ErrBusy is in the Failure of a caller that was not served because too many fetches
	// wait for the upstream: the caller's own where the class is Throttled. A Fetch
	// returns it if it did not ask the upstream at all for that reason.
	ErrBusy = errors.New("too many requests for new tokens are waiting")
)

// Config bounds a Cache. The zero value takes the defaults.
type Config struct {
	Size int // tokens in memory; 0 means DefaultSize
	// InUse reports whether a caller that was given the key's token is still there, and
	// may still have it. While that is true of one, the token is refreshed without any
	// request. nil means never.
	InUse func(caller netip.Addr, key Key) bool
}

// Cache holds tokens in memory and asks its upstream once for many callers. It is safe
// for concurrent use.
type Cache struct {
	fetch  Fetch
	cfg    Config
	jitter func() float64 // in [0, 1)

	ctx        context.Context // of all fetches; ended by Close
	cancel     context.CancelFunc
	wake       chan struct{}  // the refresher's
	background sync.WaitGroup // fetches and the refresher

	mu      sync.Mutex // guards all following fields, and what entries and calls say is guarded
	closed  bool
	entries *simplelru.LRU[Key, *entry]
	failed  negativeCache // keys without a token
	calls   map[callID]*call
	group   singleflight.Group // runs the calls
	quotas  *simplelru.LRU[netip.Addr, *quota]
	stats   Stats
}

// New returns an empty cache in front of fetch. Close it when done.
func New(fetch Fetch, cfg Config) *Cache {
	if cfg.Size <= 0 {
		cfg.Size = DefaultSize
	}
	if cfg.InUse == nil {
		cfg.InUse = func(netip.Addr, Key) bool { return false }
	}
	c := &Cache{
		fetch: fetch, cfg: cfg, jitter: rand.Float64, wake: make(chan struct{}, 1),
		entries: newLRU[Key, *entry](cfg.Size), failed: newNegativeCache(),
		calls: make(map[callID]*call), quotas: newLRU[netip.Addr, *quota](maxQuotas),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.background.Go(c.refreshAhead)
	return c
}

func newLRU[K comparable, V any](size int) *simplelru.LRU[K, V] {
	lru, err := simplelru.NewLRU[K, V](size, nil)
	if err != nil { // only for a size below 1
		panic(err)
	}
	return lru
}

// Get returns the token for key. caller is the address of the client, the zero one for
// the node itself. The error is a *Failure when there is no valid token to serve, ctx's
// when that ends first (the fetch goes on), ErrKeyTooLong, or ErrClosed after Close. With a
// ctx that has ended already, Get returns only a token that it need not wait for, and its
// error has no effect.
func (c *Cache) Get(ctx context.Context, key Key, caller netip.Addr) (*Token, error) {
	token, _, err := c.GetAt(ctx, key, caller, time.Now())
	return token, err
}

// GetAt is Get for a caller that has just read the clock, which takes as long as the rest. It
// also says where the token came from.
func (c *Cache) GetAt(ctx context.Context, key Key, caller netip.Addr, now time.Time) (*Token, Source, error) {
	c.mu.Lock()
	e, freshness, loading, err := c.getLocked(ctx, key, caller, now)
	c.mu.Unlock()
	switch {
	case err != nil:
		return nil, Memory, err
	case loading == nil && freshness == fresh:
		return e.token, Memory, nil
	case loading == nil:
		return e.token, Refreshing, nil
	case e == nil:
		return c.wait(ctx, loading)
	default:
		return c.waitForRefresh(ctx, e, loading, now)
	}
}

// getLocked returns the valid entry of the key, what to wait for, or both: then the entry
// is for the case that the refresh fails or takes long.
func (c *Cache) getLocked(ctx context.Context, key Key, caller netip.Addr, now time.Time) (*entry, freshness, *loading, error) {
	e, freshness := c.lookupLocked(key, now)
	if e == nil {
		if ctx.Err() != nil {
			return nil, expired, nil, ctx.Err()
		}
		c.stats.Misses++
		if err := c.refusedLocked(key, now); err != nil {
			return nil, expired, nil, err
		}
		l, err := c.waitLocked(ctx, callID{Key: key}, nil, caller, now)
		return nil, expired, l, err
	}
	e.addUser(caller)
	switch freshness {
	case expiring:
		if ctx.Err() != nil {
			return nil, expiring, nil, ctx.Err()
		}
		c.stats.Expiring++
		first := c.calls[callID{Key: key}] == nil
		if !c.refreshLocked(e, caller, now) {
			return e, expiring, nil, nil
		}
		l, err := c.waitLocked(ctx, callID{Key: key}, e, caller, now)
		if first && err == nil {
			l.source = Upstream
		}
		return e, expiring, l, err
	case due:
		c.stats.Due++
		if !e.demanded {
			e.demanded = true
			c.wakeRefresher()
		}
	default:
		c.stats.Fresh++
	}
	return e, freshness, nil, nil
}

// lookupLocked returns the valid entry of the key, now the most recently used one, and how
// fresh it is; nil if the token is missing or expired.
func (c *Cache) lookupLocked(key Key, now time.Time) (*entry, freshness) {
	if e, ok := c.entries.Get(key); ok {
		if f := e.freshness(now); f != expired {
			return e, f
		}
	}
	return nil, expired
}

// refusedLocked says why a key without a token is not fetched.
func (c *Cache) refusedLocked(key Key, now time.Time) error {
	if key.tooLong() {
		return ErrKeyTooLong
	}
	if failure := c.failed.get(key, now); failure != nil {
		c.stats.NegativeHits++
		return failure
	}
	return nil
}

// waitForRefresh serves a token that is about to expire: a new one, if it comes at once.
func (c *Cache) waitForRefresh(ctx context.Context, e *entry, l *loading, now time.Time) (*Token, Source, error) {
	if e.left(now) > refreshWait { // else there is nothing to serve in the end
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, refreshWait)
		defer cancel()
	}
	token, source, err := c.wait(ctx, l)
	if err != nil && e.freshness(time.Now()) != expired {
		return e.token, Refreshing, nil
	}
	return token, source, err
}

// Renew is GetAt for a caller that does not want the token that is in memory, if replace
// says so of it; nil replaces any. Each key is renewed once in 5 s at most: in between
// callers get the token in memory.
func (c *Cache) Renew(ctx context.Context, key Key, caller netip.Addr, replace func(*Token) bool) (*Token, Source, error) {
	if replace != nil {
		c.mu.Lock()
		e, _ := c.lookupLocked(key, time.Now())
		c.mu.Unlock()
		if e != nil && !replace(e.token) {
			return c.GetAt(ctx, key, caller, time.Now())
		}
	}
	c.mu.Lock()
	l, err := c.renewLocked(ctx, key, caller, time.Now())
	c.mu.Unlock()
	switch {
	case err != nil:
		return nil, Memory, err
	case l == nil:
		return c.GetAt(ctx, key, caller, time.Now())
	default:
		return c.wait(ctx, l)
	}
}

// renewLocked joins or starts a renewal, and returns nil if it is too early for one.
func (c *Cache) renewLocked(ctx context.Context, key Key, caller netip.Addr, now time.Time) (*loading, error) {
	id := callID{Key: key, renewal: true}
	e, _ := c.lookupLocked(key, now)
	if e == nil {
		if err := c.refusedLocked(key, now); err != nil {
			return nil, err
		}
	} else {
		if c.calls[id] == nil && now.Sub(e.renewedAt) < renewPause {
			return nil, nil
		}
		e.addUser(caller)
	}
	return c.waitLocked(ctx, id, e, caller, now)
}

// Close ends all fetches and waits for them. Tokens in memory are still served.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.background.Wait()
}
