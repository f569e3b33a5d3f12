package tokencache

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// maxRefreshes bounds the background refreshes under way at one upstream, IMDS or Entra:
// fewer than its slots, so that callers find one.
const maxRefreshes = 3

// refresher stands for the refresher among the callers. No pod has that address.
var refresher = netip.IPv6Unspecified()

// refreshAhead refreshes tokens that are due and in use, and removes expired ones, until
// the cache is closed. It sleeps in between: a node's tokens are due twice a day.
func (c *Cache) refreshAhead() {
	var timer <-chan time.Time
	for {
		select {
		case <-c.wake:
		case <-timer:
		case <-c.ctx.Done():
			return
		}
		now := time.Now()
		timer = nil
		if next := c.refreshDue(now); !next.IsZero() {
			timer = time.After(next.Sub(now))
		}
	}
}

// wakeRefresher makes it look at all entries, so that one signal is as good as many.
func (c *Cache) wakeRefresher() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// refreshDue does what is to be done at now, and returns when there will be more by
// time alone; zero for never.
func (c *Cache) refreshDue(now time.Time) (next time.Time) {
	later := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	var full [2]bool // IMDS and Entra, until the next refresh to end wakes the refresher
	for _, e := range c.surveyEntries(now, later) {
		upstream := 0
		if _, principal := e.key.FromEntra(); principal {
			upstream = 1
		}
		if full[upstream] { // even if a slot is free by now: it is for the first to expire
			continue
		}
		if !c.wanted(e) {
			later(now.Add(e.left(now))) // to remove it
			continue
		}
		c.mu.Lock()
		if full[upstream] = c.refreshesLocked(e.key) >= maxRefreshes; !full[upstream] {
			c.refreshLocked(e, refresher, now)
		}
		c.mu.Unlock()
	}
	return next
}

// surveyEntries removes expired entries, and returns those that may be refreshed now, the
// first to expire first. It calls later for the others.
func (c *Cache) surveyEntries(now time.Time, later func(time.Time)) (ready []*entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries.Values() {
		switch state := e.freshness(now); {
		case c.calls[callID{Key: e.key}] != nil: // its end wakes the refresher
		case state == expired:
			c.entries.Remove(e.key)
		case state == fresh || now.Before(e.notBefore):
			later(e.nextCheck(now))
		default:
			ready = append(ready, e)
		}
	}
	slices.SortFunc(ready, func(a, b *entry) int { return cmp.Compare(a.left(now), b.left(now)) })
	return ready
}

// wanted reports whether anybody was given the token when it was due, or was given it
// before and is still there.
func (c *Cache) wanted(e *entry) bool {
	c.mu.Lock()
	demanded, users := e.demanded, slices.Collect(maps.Keys(e.users))
	c.mu.Unlock()
	if demanded {
		return true
	}
	gone := slices.DeleteFunc(slices.Clone(users), func(user netip.Addr) bool { return c.cfg.InUse(user, e.key) })
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, user := range gone {
		delete(e.users, user)
	}
	e.lastUser = netip.Addr{} // it may be among those
	return len(gone) < len(users)
}

// refreshesLocked is how many refreshes are under way at the key's upstream.
func (c *Cache) refreshesLocked(key Key) (count int) {
	_, principal := key.FromEntra()
	for id, cl := range c.calls {
		if _, ok := id.FromEntra(); ok == principal && cl.stale != nil && !id.renewal {
			count++
		}
	}
	return count
}

// refreshLocked starts a fetch to replace an entry, and does not wait for it. It reports
// whether one is under way.
func (c *Cache) refreshLocked(e *entry, caller netip.Addr, now time.Time) bool {
	id := callID{Key: e.key}
	if c.calls[id] != nil {
		return true
	}
	if current, _ := c.entries.Peek(e.key); current != e || now.Before(e.notBefore) {
		return false
	}
	l, err := c.joinLocked(id, e, caller, now)
	if err != nil {
		return false
	}
	l.call.waiting-- // nobody reads the result
	return true
}
