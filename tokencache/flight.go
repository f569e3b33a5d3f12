package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// flight is what singleflight makes one of: a fetch for a key. A renewal, for which no
// cache on the way may answer, is apart from the others.
type flight struct {
	Key
	renewal bool
}

func (f flight) String() string {
	if f.renewal {
		return "renewal of " + f.Key.String()
	}
	return f.Key.String()
}

// want is the interest in a flight that has not landed. Callers and refreshes share it;
// when the last one leaves, the flight ends.
type want struct {
	ctx     context.Context
	cancel  context.CancelFunc
	waiting int        // guarded by Cache.mu
	starter netip.Addr // who counts for it
	seen    *entry     // what is to be replaced; nil for a miss
	turns   *turns
	ticket  *ticket
}

// join makes the caller wait for a flight, which it starts if there is none. mu is
// held.
func (c *Cache) join(f flight, seen *entry, caller netip.Addr) (*want, <-chan singleflight.Result, error) {
	if c.closed {
		return nil, nil, ErrClosed
	}
	w := c.wants[f]
	if w == nil {
		if caller.IsValid() && c.started[caller] >= maxFlights {
			return nil, nil, c.turnAway(Throttled, c.turnsOf(f.Key))
		}
		if refreshes := seen != nil && !f.renewal; !refreshes {
			if err := c.budgets.spend(caller, time.Now()); err != nil {
				return nil, nil, c.tooFast(err)
			}
		}
		f.Resource = strings.Clone(f.Resource) // what keeps it must not keep the request that it is part of
		w = &want{starter: caller, seen: seen, turns: c.turnsOf(f.Key), ticket: new(ticket)}
		w.ctx, w.cancel = context.WithCancel(c.ctx)
		c.wants[f] = w
		c.started[caller]++
		if f.renewal && seen != nil {
			// The key has no other for a while: whoever leaves, it is made.
			seen.renewedAt = time.Now()
			landed := c.interest(f, w, caller)
			c.background.Go(func() {
				<-landed
				c.leave(f, w)
			})
		}
	} else {
		c.stats.joined.Add(1)
	}
	return w, c.interest(f, w, caller), nil
}

// turnsOf are those that the key's fetch takes.
func (c *Cache) turnsOf(key Key) *turns {
	if _, ok := key.ServicePrincipal(); ok {
		return c.principalTurns
	}
	return c.managedTurns
}

// interest adds one who waits. mu is held.
func (c *Cache) interest(f flight, w *want, caller netip.Addr) <-chan singleflight.Result {
	w.waiting++
	w.turns.wanted(w.ticket, caller)
	return c.group.DoChan(f.String(), func() (any, error) { return c.fly(f, w) })
}

// leave ends the interest of one, and with the last one's the flight.
func (c *Cache) leave(f flight, w *want) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.waiting--; w.waiting > 0 {
		return
	}
	w.cancel()
	c.end(f, w)
	if c.started[w.starter]--; c.started[w.starter] == 0 {
		delete(c.started, w.starter)
	}
}

// end makes who comes now start a flight of its own. mu is held.
func (c *Cache) end(f flight, w *want) {
	if c.wants[f] == w {
		delete(c.wants, f)
		c.group.Forget(f.String())
	}
}

// await waits for a flight as long as ctx, the flight's own deadline and, until its
// first turn has come, maxWait allow.
func (c *Cache) await(ctx context.Context, f flight, seen *entry, caller netip.Addr) (*Token, error) {
	c.mu.Lock()
	// Waiting too long is the doing of a caller who wants other tokens as well; one who
	// wants a single one waits for others.
	tooLong := Unavailable
	started := c.started[caller]
	if w := c.wants[f]; w != nil && w.starter == caller {
		started-- // this one
	}
	if started > 0 {
		tooLong = Throttled
	}
	w, landed, err := c.join(f, seen, caller)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer c.leave(f, w)
	patience := time.NewTimer(maxWait)
	defer patience.Stop()
	for {
		select {
		case r := <-landed:
			if r.Err != nil {
				return nil, r.Err
			}
			e := r.Val.(*entry) //nolint:errcheck // fly returns nothing else
			e.users.add(caller)
			return e.token, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-patience.C:
			if !w.turns.hadTurn(w.ticket) {
				return nil, c.turnAway(tooLong, w.turns)
			}
		}
	}
}

// turnAway is the failure of a caller who is not served because of how much is asked.
func (c *Cache) turnAway(class Class, of *turns) error {
	c.stats.turnedAway.Add(1)
	return &Failure{Class: class, RetryAfter: max(of.backlog(), time.Second), Err: ErrBusy}
}

// tooFast is the failure of a caller who is not served because of how often it asks.
func (c *Cache) tooFast(err *overRateError) error {
	c.stats.turnedAway.Add(1)
	return &Failure{Class: Throttled, RetryAfter: max(err.wait, time.Second), Err: err}
}

// fly looks again, since another flight may have landed between the caller's look and
// this one's start, then fetches, and stores what has come.
func (c *Cache) fly(f flight, w *want) (*entry, error) {
	defer func() { // while some are still to be told, others would keep it up
		c.mu.Lock()
		defer c.mu.Unlock()
		c.end(f, w)
	}()
	now := time.Now()
	if e := c.lookup(f.Key); e != nil && e != w.seen && (e.renewed || !f.renewal) && e.freshness(now) != expired {
		return e, nil
	}
	if failure := c.failedJustNow(f, w, now); failure != nil {
		return nil, failure
	}
	if !c.takeOff() {
		return nil, ErrClosed
	}
	defer c.background.Done()
	c.stats.flights.Add(1)
	token, err := c.ask(f, w)
	switch {
	case err == nil:
		return c.store(f, w.seen, w.starter, token, time.Now()), nil
	case c.ctx.Err() != nil:
		return nil, ErrClosed
	case w.ctx.Err() != nil: // nobody waits for it; it says nothing of the upstream
		return nil, err
	default:
		return nil, c.fail(f, w.starter, err, time.Now())
	}
}

// takeOff counts one more flight, unless the cache is closed.
func (c *Cache) takeOff() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.background.Add(1)
	return true
}

// ask makes the fetch, within FetchTimeout. What it waits for turns is not taken from
// that: for the first however long, since callers have maxWait for it; for those of its
// retries what is left of maxWait then. On a node that starts, a retry waits as long as
// a first turn.
func (c *Cache) ask(f flight, w *want) (token *Token, err error) {
	// singleflight would end the process for a panic in a flight; it is this
	// flight's failure, and nobody else's.
	defer func() {
		if p := recover(); p != nil {
			token, err = nil, fmt.Errorf("fetching a token panicked: %v", p)
		}
	}()
	ctx, cancel := context.WithCancelCause(w.ctx)
	defer cancel(nil)
	ends := time.Now().Add(c.cfg.FetchTimeout)
	deadline := time.AfterFunc(c.cfg.FetchTimeout, func() { cancel(context.DeadlineExceeded) })
	defer deadline.Stop()
	waits, first := maxWait, true
	end := func(time.Duration) {}
	defer func() { end(0) }() // for a fetch that did not come to it
	turn := func(waiting context.Context) (done func(time.Duration), err error) {
		begin := time.Now()
		if first {
			deadline.Stop()
		} else {
			deadline.Reset(ends.Sub(begin) + waits)
		}
		err = w.turns.wait(waiting, w.ticket)
		now := time.Now()
		waited := now.Sub(begin)
		if first {
			ends = now.Add(c.cfg.FetchTimeout)
		} else {
			ends = ends.Add(min(waited, waits))
		}
		waits, first = max(waits-waited, 0), false
		deadline.Reset(ends.Sub(now))
		if err != nil {
			return nil, err
		}
		var once sync.Once
		end = func(leaveAlone time.Duration) { once.Do(func() { w.turns.done(leaveAlone) }) }
		return end, nil
	}
	token, err = c.fetch(ctx, Request{Key: f.Key, Fresh: f.renewal, Turn: turn})
	now := time.Now()
	switch {
	case err != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return nil, fmt.Errorf("%w after %s: %w", context.DeadlineExceeded, c.cfg.FetchTimeout, err)
	case err != nil:
		return nil, err
	case !now.Before(token.ExpiresOn):
		return nil, fmt.Errorf("the upstream's token expired at %s, before it arrived; check the node's clock",
			token.ExpiresOn.UTC().Format(time.RFC3339))
	}
	return token, nil
}

// fail remembers that a fetch has failed. A token that is still valid is not touched.
func (c *Cache) fail(f flight, starter netip.Addr, err error, now time.Time) *Failure {
	class, wait := classOf(err)
	c.stats.failures[class].Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if class == Refused {
		c.budgets.refused(starter, now)
	}
	e := c.lookup(f.Key)
	if e == nil || e.freshness(now) == expired {
		return c.failures.remember(f.Key, err, now)
	}
	if wait >= e.left(now) {
		_ = c.failures.remember(f.Key, err, now) // for when there is no token any more
	}
	again := max(renewPause, wait)
	if f.renewal { // more would let any caller keep the refreshes back
		e.leaveAlone(now.Add(wait))
	} else {
		e.postpone(now, wait)
		again = e.askAfter.Sub(now)
	}
	c.wakeRefresher() // it may be about to refresh the key, which is in vain now
	return &Failure{Class: class, RetryAfter: again, Err: err}
}

// failedJustNow is the failure of a flight that landed when this one was joined.
func (c *Cache) failedJustNow(f flight, w *want, now time.Time) *Failure {
	if w.seen == nil {
		return c.failures.recall(f.Key, now)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if again := w.seen.askAfter.Sub(now); again > 0 && !f.renewal {
		return &Failure{RetryAfter: again, Err: errors.New("a refresh has just failed")}
	}
	return nil
}
