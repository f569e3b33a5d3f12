package tokencache

import "time"

// Stats is what the cache has done since it was made.
type Stats struct {
	// Requests answered from memory, by the freshness of the token.
	Fresh, Due, Expiring uint64

	Misses       uint64 // requests for a key without a token
	NegativeHits uint64 // requests answered with a failure from memory
	TurnedAway   uint64 // requests not served because too much is asked of the upstream
	Joined       uint64 // requests that waited for a fetch which was under way

	Fetches   uint64 // all of them, refreshes and renewals included
	Refreshes uint64 // fetches to replace a token that was still valid
	Renewals  uint64 // requests that did not accept the token in memory
	Evictions uint64 // tokens removed to make room for others

	Failures [3]uint64 // fetches that brought no token, by Class

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
