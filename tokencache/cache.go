package tokencache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

// DefaultSize is how many tokens a cache holds unless told otherwise: 250 pods
// with eight resources each. At 2 to 4 KB a token that is at most 8 MB.
const DefaultSize = 2000

// DefaultFetchTimeout bounds one flight, its retries included, unless told
// otherwise. Callers that wait longer are told to come back.
const DefaultFetchTimeout = 10 * time.Second

// ErrClosed is returned by Get once the cache is closed and the token is not in
// memory.
var ErrClosed = errors.New("token cache is closed")

// Config bounds a Cache. The zero value takes the defaults.
type Config struct {
	Size         int           // tokens held; 0 means DefaultSize
	FetchTimeout time.Duration // of one flight; 0 means DefaultFetchTimeout
}

// Cache holds tokens in memory and asks its upstream once for many callers. It
// is safe for concurrent use.
type Cache struct {
	fetch   Fetch
	timeout time.Duration
	entries *lru.Cache[Key, entry]
	flights singleflight.Group
	stats   counters

	ctx    context.Context // of all flights; ended by Close
	cancel context.CancelFunc

	// mu guards closed, the Add of flying against its Wait, and each write to
	// entries: a postponed old token must not take the place of a new one.
	mu     sync.Mutex
	closed bool
	flying sync.WaitGroup
}

// New returns an empty cache in front of fetch. Close it when done.
func New(fetch Fetch, cfg Config) *Cache {
	if cfg.Size <= 0 {
		cfg.Size = DefaultSize
	}
	if cfg.FetchTimeout <= 0 {
		cfg.FetchTimeout = DefaultFetchTimeout
	}
	entries, err := lru.New[Key, entry](cfg.Size)
	if err != nil { // only for a size below 1
		panic(err)
	}
	c := &Cache{fetch: fetch, timeout: cfg.FetchTimeout, entries: entries}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Get returns the token for key. It returns the fetch's error when there is no
// valid token to serve, ctx's error when the caller's own patience ends first
// (the flight goes on for the others), and ErrClosed after Close.
func (c *Cache) Get(ctx context.Context, key Key) (*Token, error) {
	if e, ok := c.entries.Get(key); ok {
		switch e.freshness(time.Now()) {
		case fresh:
			c.stats.hits.Add(1)
			return e.token, nil
		case due:
			c.stats.hits.Add(1)
			c.refresh(key)
			return e.token, nil
		case expired:
		}
	}
	c.stats.misses.Add(1)

	landed := c.flights.DoChan(key.String(), func() (any, error) { return c.fly(key) })
	select {
	case r := <-landed:
		token, _ := r.Val.(*Token) // nil with an error
		return token, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// refresh starts a flight for a token that is due, and does not wait for it.
// Marking the entry as postponed first keeps the callers that follow from
// starting another, and is the pause after a failure at the same time.
func (c *Cache) refresh(key Key) {
	c.mu.Lock()
	now := time.Now()
	current, ok := c.entries.Peek(key)
	first := ok && !c.closed && current.freshness(now) == due
	if first {
		c.entries.Add(key, current.postponed(now))
	}
	c.mu.Unlock()
	if !first {
		return
	}
	c.stats.refreshes.Add(1)
	c.flights.DoChan(key.String(), func() (any, error) { return c.fetchAndStore(key) })
}

// fly answers a miss: look again, since a flight may have landed between the
// caller's look and this one's start, then fetch.
func (c *Cache) fly(key Key) (*Token, error) {
	if e, ok := c.entries.Peek(key); ok && e.freshness(time.Now()) != expired {
		return e.token, nil
	}
	return c.fetchAndStore(key)
}

func (c *Cache) fetchAndStore(key Key) (token *Token, err error) {
	if !c.takeOff() {
		return nil, ErrClosed
	}
	defer c.flying.Done()
	c.stats.fetches.Add(1)
	// singleflight would end the process for a panic in a flight; it is this
	// flight's failure, and nobody else's.
	defer func() {
		if p := recover(); p != nil {
			token, err = nil, fmt.Errorf("fetching a token panicked: %v", p)
		}
		if err != nil {
			c.stats.failures.Add(1)
		}
	}()

	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	token, err = c.fetch(ctx, Request{Key: key, Turn: func(context.Context) (func(time.Duration), error) { return func(time.Duration) {}, nil }})
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if !now.Before(token.ExpiresOn) {
		return nil, fmt.Errorf("the upstream's token expired at %s, before it arrived; check the node's clock",
			token.ExpiresOn.UTC().Format(time.RFC3339))
	}
	c.mu.Lock()
	c.entries.Add(key, newEntry(token, now))
	c.mu.Unlock()
	return token, nil
}

// takeOff counts one more flight, unless the cache is closed.
func (c *Cache) takeOff() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.flying.Add(1)
	return true
}

// Close ends all flights and waits for them. Tokens in memory can still be had.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.flying.Wait()
}

// Stats is a snapshot of what the cache has done since it was made.
type Stats struct {
	Hits      uint64 // answered from memory
	Misses    uint64 // had to wait for a flight
	Fetches   uint64 // calls of the upstream, refreshes included
	Refreshes uint64 // flights sent off behind a caller's back
	Failures  uint64 // fetches that brought no token
	Entries   int    // tokens held now, expired ones included
}

type counters struct {
	hits, misses, fetches, refreshes, failures atomic.Uint64
}

// Stats returns the counters as they are now.
func (c *Cache) Stats() Stats {
	return Stats{
		Hits:      c.stats.hits.Load(),
		Misses:    c.stats.misses.Load(),
		Fetches:   c.stats.fetches.Load(),
		Refreshes: c.stats.refreshes.Load(),
		Failures:  c.stats.failures.Load(),
		Entries:   c.entries.Len(),
	}
}
