package tokencache

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// maxRefreshes is how many refreshes that take the same turns are under way when the
// refresher begins no more: fewer than DefaultAtOnce, so that callers who wait find a place.
const maxRefreshes = 3

// refresher stands for the refresher among the callers who wait for turns. It is an
// address that nobody has.
var refresher = netip.IPv6Unspecified()

// refreshAhead refreshes what is due and in use, and removes what has expired, until
// the cache is closed. It sleeps in between: a node's tokens are due twice a day.
func (c *Cache) refreshAhead() {
	var alarm <-chan time.Time
	for {
		select {
		case <-c.wake:
		case <-alarm:
		case <-c.ctx.Done():
			return
		}
		now := time.Now()
		alarm = nil
		if next := c.refreshDue(now); !next.IsZero() {
			alarm = time.After(next.Sub(now))
		}
	}
}

// wakeRefresher makes it look at once. It looks at everything, so that one reminder
// is as good as many.
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
	ready, running := c.survey(now, later)
	for _, e := range ready {
		// Whoever was given it when it was due wants it; else who was given it at all,
		// and is still there.
		if !e.asked.Load() && !e.users.keep(func(user netip.Addr) bool { return c.cfg.InUse(user, e.key) }) {
			later(now.Add(e.left(now)))
			continue
		}
		from := c.turnsOf(e.key)
		if running[from] >= maxRefreshes {
			continue // the next to land reminds of it
		}
		if c.refresh(e, refresher) {
			running[from]++
		}
	}
	return next
}

// survey removes what has expired, and returns what could be refreshed, the most
// urgent first. It calls later for the rest.
func (c *Cache) survey(now time.Time, later func(time.Time)) (ready []*entry, running map[*turns]int) {
	running = make(map[*turns]int)
	c.mu.Lock()
	defer c.mu.Unlock()
	var gone []Key
	for key, e := range *c.byKey.Load() {
		switch state := e.freshness(now); {
		case e.refreshing:
			running[c.turnsOf(e.key)]++
		case state == expired:
			gone = append(gone, key)
			c.remove(e)
		case state == fresh || now.Before(e.askAfter):
			later(e.attention(now))
		default:
			ready = append(ready, e)
		}
	}
	if len(gone) > 0 {
		c.publish(nil, gone...)
	}
	slices.SortFunc(ready, func(a, b *entry) int { return cmp.Compare(a.left(now), b.left(now)) })
	return ready, running
}

// refresh has a token fetched in e's place, and does not wait for it. It reports
// whether one is on its way, be it through this call or another.
func (c *Cache) refresh(e *entry, caller netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.refreshing {
		return true
	}
	if time.Now().Before(e.askAfter) {
		return false
	}
	f := flight{Key: e.key}
	w, landed, err := c.join(f, e, caller)
	if err != nil {
		return false
	}
	c.stats.refreshes.Add(1)
	e.refreshing = true
	c.background.Go(func() {
		<-landed
		c.leave(f, w)
		c.mu.Lock()
		e.refreshing = false
		c.mu.Unlock()
		c.wakeRefresher()
	})
	return true
}
