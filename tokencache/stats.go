package tokencache

import "time"

// Source is where the token of a request came from. The later ones take longer.
type Source int

// The sources of tokens.
const (
	Memory     Source = iota // in memory, and fresh
	Refreshing               // in memory, while a new one is due or fetched
	Joined                   // from upstream, by a fetch that another request had started
	Upstream                 // from upstream, by a fetch for this request
)

// String names the source as metrics do.
func (s Source) String() string {
	return [...]string{Memory: "memory", Refreshing: "refreshing", Joined: "joined", Upstream: "upstream"}[s]
}

// Reason is why a token is fetched.
type Reason int

// The reasons to fetch a token.
const (
	Miss    Reason = iota // no valid token is in memory
	Refresh               // the one in memory is due
	Renewal               // a request did not accept the one in memory
)

// String names the reason as metrics do.
func (r Reason) String() string {
	return [...]string{Miss: "miss", Refresh: "refresh", Renewal: "renewal"}[r]
}

// Stats is what the cache has done since it was made.
type Stats struct {
	// Requests answered from memory, by the freshness of the token.
	Fresh, Due, Expiring uint64

	Misses       uint64 // requests for a key without a token
	NegativeHits uint64 // requests answered with a failure from memory
	Rejections   uint64 // requests not served because too much is asked of the upstream
	Joined       uint64 // requests that waited for a fetch which was under way

	Fetches   [3]uint64 // that were started, by Reason
	Failures  [3]uint64 // fetches that brought no token, by Class
	Evictions uint64    // tokens removed to make room for others

	Entries int // tokens in memory now
	Failing int // keys without a token whose last fetch failed, within the last minutes
}

// Stats returns the counters as they are now.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Entries, s.Failing = c.entries.Len(), c.failed.recent(time.Now())
	return s
}
