package tokencache

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Held describes a token in memory, without it.
type Held struct {
	Key       Key
	ExpiresOn time.Time
	// NextRefresh is when the token is refreshed next, if somebody may still use it then; zero if
	// it expires before.
	NextRefresh     time.Time
	FailedRefreshes int // in a row
}

// HeldBy describes the valid tokens that a caller was given and those that replaced them, those that
// expire first in front, most of them at most, and returns how many there are.
func (c *Cache) HeldBy(caller netip.Addr, most int) (held []Held, total int) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries.Values() {
		if _, given := e.users[caller]; !given || e.freshness(now) == expired {
			continue
		}
		end := now.Add(e.left(now))
		h := Held{Key: e.key, ExpiresOn: end, FailedRefreshes: e.failures}
		if next := e.nextCheck(now); next.Before(end) {
			h.NextRefresh = next
		}
		held = append(held, h)
	}
	slices.SortFunc(held, func(a, b Held) int {
		return cmp.Or(a.ExpiresOn.Compare(b.ExpiresOn), cmp.Compare(a.Key.Resource, b.Key.Resource))
	})
	total = len(held)
	return held[:min(total, most)], total
}
