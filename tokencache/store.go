package tokencache

import (
	"net/netip"
	"time"
)

// maxOwned bounds the tokens in memory that one caller's fetches brought first: the pod
// chooses the resource, and must not evict everybody else's.
const maxOwned = 250

// storeLocked keeps the token that a call has brought, and returns the key's entry. A
// renewal that landed first stays: it was asked for later than a refresh.
func (c *Cache) storeLocked(cl *call, token *Token, now time.Time) *entry {
	e, _ := c.entries.Peek(cl.id.Key)
	if e == nil || e == cl.stale || cl.id.renewal || e.freshness(now) == expired {
		e = c.replaceLocked(cl, e, token, now)
	}
	for _, caller := range cl.callers {
		e.addUser(caller)
	}
	return e
}

// Drop removes the tokens and failures of the keys for which unused returns true, and returns how
// many tokens there were. What a fetch under way brings is given to those that wait for it, and not
// kept. unused must not call c.
func (c *Cache) Drop(unused func(Key) bool) (dropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.entries.Keys() {
		if unused(key) {
			c.entries.Remove(key)
			dropped++
		}
	}
	for _, key := range c.failed.byKey.Keys() {
		if unused(key) {
			c.failed.remove(key)
		}
	}
	for id, cl := range c.calls {
		if unused(id.Key) {
			cl.dropped = true
		}
	}
	return dropped
}

func (c *Cache) replaceLocked(cl *call, before *entry, token *Token, now time.Time) *entry {
	e := newEntry(cl.id.Key, token, now, c.jitter())
	switch {
	case before != nil:
		e.owner, e.users, e.renewedAt = before.owner, before.users, before.renewedAt
	case cl.stale != nil: // evicted meanwhile
		e.owner = cl.stale.owner
	default:
		e.owner = cl.callers[0]
	}
	if cl.id.renewal {
		e.renewedAt = now
	}
	c.addLocked(e)
	return e
}

// addLocked puts an entry into the cache, in the place of the key's last one or of the
// least recently used: of its owner's, if those are too many, else of all.
func (c *Cache) addLocked(e *entry) {
	if !c.entries.Contains(e.key) {
		c.evictForLocked(e.owner)
	}
	if c.entries.Add(e.key, e) {
		c.stats.Evictions++
	}
	c.failed.remove(e.key)
}

func (c *Cache) evictForLocked(owner netip.Addr) {
	if !owner.IsValid() {
		return
	}
	var oldest *entry
	owned := 0
	for _, e := range c.entries.Values() { // the oldest first
		if e.owner != owner {
			continue
		}
		if owned++; oldest == nil {
			oldest = e
		}
	}
	if owned >= maxOwned {
		c.entries.Remove(oldest.key)
		c.stats.Evictions++
	}
}
