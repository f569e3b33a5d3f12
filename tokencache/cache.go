package tokencache

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

// What a Config that leaves them out has.
const (
	// DefaultSize is 250 pods with eight resources each. At 2 to 4 KB a token that
	// is at most 8 MB.
	DefaultSize         = 2000
	DefaultFetchTimeout = 10 * time.Second
	// IMDS allows a virtual machine 20 requests for tokens a second and 5 at once
	// (learn.microsoft.com, "Azure Instance Metadata Service", Rate limiting). The
	// difference is for the node's own programs.
	DefaultPerSecond = 18
	DefaultAtOnce    = 4
)

const (
	// maxWait is how long a caller waits for the first turn of its flight. With 250
	// pods on a node that all want one token, and an IMDS that takes 0.1 s for each, a
	// round takes 14.7 s; the rest is for refreshes, second tries and pods that want more.
	// proxy's writeTimeout, within which there may be two such waits, allows no more.
	maxWait = 18 * time.Second
	// maxFlights is how many flights one caller may have started that are under way.
	maxFlights = 20
	// maxHolding is how many tokens are held that one caller was the first to want:
	// the pod chooses the resource, and should not drive out everybody's.
	maxHolding = 250
	// urgentWait is how long a caller waits for a refresh while there is a token
	// that is still good.
	urgentWait = time.Second
	// renewPause is the least time between two renewals of a key.
	renewPause = 5 * time.Second
	// maxKey bounds the memory of a key, in bytes: the pod chooses the resource, and
	// no real one is longer than a few hundred.
	maxKey = 2048
	// touchEvery is how exact the LRU is. A hit within that time of the last one
	// takes no lock.
	touchEvery = time.Second
)

var (
	// ErrClosed is returned once the cache is closed and the token is not in memory.
	ErrClosed = errors.New("token cache is closed")
	// ErrKeyTooLong is returned for a key that no upstream would know.
	ErrKeyTooLong = errors.New("the resource or the identity's ID is too long")
	// ErrBusy is in the Failure of a caller who was not served because of how much
	// is asked of the upstream: by the caller itself where the class is Throttled.
	ErrBusy = errors.New("more is asked of the upstream than it gives")
)

// Config bounds a Cache. The zero value takes the defaults.
type Config struct {
	Size int // tokens held; 0 means DefaultSize
	// FetchTimeout bounds one flight, its retries included but not what it waits
	// for its turns; 0 means DefaultFetchTimeout.
	FetchTimeout time.Duration
	// PerSecond and AtOnce bound the requests for tokens of managed identities, and,
	// apart from them, for those of service principals; 0 means DefaultPerSecond and
	// DefaultAtOnce.
	PerSecond, AtOnce int
	// InUse reports whether a caller who was given the key's token is still there,
	// and may still have it. While it is true of one, the token is refreshed
	// without being asked for. nil is never.
	InUse func(caller netip.Addr, key Key) bool
}

// Cache holds tokens in memory and asks its upstream once for many callers. It
// is safe for concurrent use.
type Cache struct {
	fetch    Fetch
	cfg      Config
	failures failures
	group    singleflight.Group
	stats    counters
	began    time.Time
	jitter   func() float64 // in [0, 1)

	// Apart, so that what hangs at Entra holds up nothing at IMDS.
	managedTurns, principalTurns *turns

	// byKey is what entries holds, for readers who take no lock.
	byKey atomic.Pointer[map[Key]*entry]

	ctx        context.Context // of all flights; ended by Close
	cancel     context.CancelFunc
	wake       chan struct{}  // the refresher's
	background sync.WaitGroup // flights, the refresher, and who waits on its behalf

	// mu guards all below, each write to entries and byKey, and the parts of an
	// entry that say so.
	mu      sync.Mutex
	entries *lru.Cache[Key, *entry]
	closed  bool
	wants   map[flight]*want
	started map[netip.Addr]int // flights under way, by who started them
	budgets budgets
	holding map[netip.Addr]int // entries, by whose flight first brought them
}

// New returns an empty cache in front of fetch. Close it when done.
func New(fetch Fetch, cfg Config) *Cache {
	if cfg.Size <= 0 {
		cfg.Size = DefaultSize
	}
	if cfg.FetchTimeout <= 0 {
		cfg.FetchTimeout = DefaultFetchTimeout
	}
	if cfg.PerSecond <= 0 {
		cfg.PerSecond = DefaultPerSecond
	}
	if cfg.AtOnce <= 0 {
		cfg.AtOnce = DefaultAtOnce
	}
	if cfg.InUse == nil {
		cfg.InUse = func(netip.Addr, Key) bool { return false }
	}
	entries, err := lru.New[Key, *entry](cfg.Size)
	if err != nil { // only for a size below 1
		panic(err)
	}
	c := &Cache{
		fetch: fetch, cfg: cfg, entries: entries, failures: newFailures(),
		managedTurns: newTurns(cfg.PerSecond, cfg.AtOnce), principalTurns: newTurns(cfg.PerSecond, cfg.AtOnce),
		began: time.Now(), jitter: rand.Float64,
		wake: make(chan struct{}, 1), wants: make(map[flight]*want),
		started: make(map[netip.Addr]int), holding: make(map[netip.Addr]int), budgets: newBudgets(),
	}
	c.byKey.Store(&map[Key]*entry{})
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.background.Go(c.refreshAhead)
	return c
}

// Get returns the token for key. caller is the address of who asks; the zero one is
// the node's own. It returns a *Failure when there is no valid token to serve, ctx's
// error when the caller's own patience ends first (the flight goes on for the
// others), ErrKeyTooLong, and ErrClosed after Close.
func (c *Cache) Get(ctx context.Context, key Key, caller netip.Addr) (*Token, error) {
	now := time.Now()
	e := c.lookup(key)
	if e == nil {
		return c.miss(ctx, key, caller, now)
	}
	switch e.freshness(now) {
	case fresh:
		c.used(e, caller, now)
		c.stats.fresh.add(caller)
		return e.token, nil
	case due:
		c.used(e, caller, now)
		c.stats.due.Add(1)
		if !e.asked.Swap(true) {
			c.wakeRefresher()
		}
		return e.token, nil
	case urgent:
		c.used(e, caller, now)
		c.stats.urgent.Add(1)
		return c.hurry(ctx, e, caller)
	default:
		return c.miss(ctx, key, caller, now)
	}
}

// Renew is Get for a caller who does not want the token that is in memory, if
// replace says so of it; nil replaces any. Each key is renewed every 5 s at most:
// in between the caller gets what there is.
func (c *Cache) Renew(ctx context.Context, key Key, caller netip.Addr, replace func(*Token) bool) (*Token, error) {
	now := time.Now()
	f := flight{Key: key, renewal: true}
	if e := c.lookup(key); e != nil && e.freshness(now) != expired {
		if replace != nil && !replace(e.token) || !c.mayRenew(e, f, now) {
			return c.Get(ctx, key, caller)
		}
		c.used(e, caller, now)
		c.stats.renewals.Add(1)
		return c.await(ctx, f, e, caller)
	}
	if failure := c.refusal(key, now); failure != nil {
		return nil, failure
	}
	c.stats.renewals.Add(1)
	return c.await(ctx, f, nil, caller)
}

// mayRenew reports whether a renewal may begin, or has begun and can be joined.
func (c *Cache) mayRenew(e *entry, f flight, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wants[f] != nil || now.Sub(e.renewedAt) >= renewPause
}

func (c *Cache) lookup(key Key) *entry { return (*c.byKey.Load())[key] }

// used keeps a token from leaving the cache, and remembers for whom to refresh it.
func (c *Cache) used(e *entry, caller netip.Addr, now time.Time) {
	e.users.add(caller)
	at := int64(now.Sub(c.began))
	if last := e.touched.Load(); at-last > int64(touchEvery) && e.touched.CompareAndSwap(last, at) {
		c.mu.Lock()
		c.entries.Get(e.key) // moves it up
		c.mu.Unlock()
	}
}

// miss waits for a flight to bring the token.
func (c *Cache) miss(ctx context.Context, key Key, caller netip.Addr, now time.Time) (*Token, error) {
	c.stats.misses.Add(1)
	if failure := c.refusal(key, now); failure != nil {
		return nil, failure
	}
	return c.await(ctx, flight{Key: key}, nil, caller)
}

// refusal is why a key for which there is no token is not fetched.
func (c *Cache) refusal(key Key, now time.Time) error {
	if len(key.ClientID)+len(key.ResourceID)+len(key.Resource) > maxKey {
		return ErrKeyTooLong
	}
	if failure := c.failures.recall(key, now); failure != nil {
		c.stats.remembered.Add(1)
		return failure
	}
	return nil
}

// hurry serves a token that is about to expire: a new one, if it comes at once.
func (c *Cache) hurry(ctx context.Context, e *entry, caller netip.Addr) (*Token, error) {
	if !c.refresh(e, caller) {
		return e.token, nil
	}
	patience := ctx
	if e.left(time.Now()) > urgentWait { // else there is nothing to serve in the end
		var cancel context.CancelFunc
		patience, cancel = context.WithTimeout(ctx, urgentWait)
		defer cancel()
	}
	token, err := c.await(patience, flight{Key: e.key}, e, caller)
	if err != nil && e.freshness(time.Now()) != expired {
		return e.token, nil
	}
	return token, err
}

// Close ends all flights and waits for them. Tokens in memory can still be had.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.background.Wait()
	c.managedTurns.stop() // each flight that ends may set the alarm
	c.principalTurns.stop()
}
