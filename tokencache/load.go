package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/singleflight"
)

const (
	// maxWait is how long a fetch waits for its slot at the upstream after the last
	// caller has joined it. With 250 pods on a node that all want one token, and an IMDS
	// that takes 0.1 s for each, a round takes 14.7 s; the rest is for refreshes, retries
	// and pods that want more.
	maxWait = 18 * time.Second
	// maxPatience is how long a caller waits in all: maxWait, and 10 s for the fetch. It
	// ends the wait for a fetch that others keep joining. proxy's writeTimeout, within
	// which there may be two such waits, allows no more.
	maxPatience = 28 * time.Second
	// maxUnattended bounds the fetches that go on when all their callers have left, some
	// 20 KB each. The others are bounded by the connections that wait for them.
	maxUnattended = 250
	// maxTraced bounds what is kept of the requests that wait for a fetch.
	maxTraced = 32
)

// callID is what singleflight runs one of: a fetch for a key. Renewals, which no cache on
// the way may answer, are apart from the others.
type callID struct {
	Key
	renewal bool
}

func (id callID) String() string {
	if id.renewal {
		return "renewal of " + id.Key.String()
	}
	return id.Key.String()
}

// reason is why the token is fetched: stale is the entry that it is to replace, nil for a miss.
func (id callID) reason(stale *entry) Reason {
	switch {
	case id.renewal:
		return Renewal
	case stale != nil:
		return Refresh
	default:
		return Miss
	}
}

// call is a fetch under way. The cache's mutex guards all fields from waiting on.
type call struct {
	id     callID
	quota  *quota // of the caller that started it
	stale  *entry // to be replaced; nil for a miss
	ctx    context.Context
	cancel context.CancelFunc

	dropped bool                // its token is not to be kept, see Cache.Drop
	waiting int                 // requests
	traced  []trace.SpanContext // of those that wait or have waited
	// callers are those that wait or have waited, the one that started it first. The limiter
	// serves the call in the turn of whichever comes first.
	callers []netip.Addr
	until   time.Time // it waits for its slot
}

// loading is what one caller waits for.
type loading struct {
	call   *call
	result <-chan singleflight.Result
	source Source // of the token
	busy   Class  // of the failure if the wait takes too long
}

// joinLocked makes the caller wait for a call, which it starts if there is none.
func (c *Cache) joinLocked(id callID, stale *entry, caller netip.Addr, now time.Time) (*loading, error) {
	q := c.quotaLocked(caller)
	l := &loading{source: Upstream, busy: Unavailable}
	cl := c.calls[id]
	// Waiting too long is the doing of a caller that wants other tokens as well; one that
	// wants a single token waits for others.
	if others := q.calls; others > 1 || others == 1 && (cl == nil || cl.quota != q) {
		l.busy = Throttled
	}
	if cl != nil {
		c.stats.Joined++
		l.source = Joined
	} else {
		var err error
		if cl, err = c.startLocked(id, stale, q, now); err != nil {
			return nil, err
		}
	}
	if !slices.Contains(cl.callers, caller) {
		cl.callers = append(cl.callers, caller)
	}
	cl.until = now.Add(maxWait)
	cl.dropped = false
	cl.waiting++
	l.call = cl
	l.result = c.group.DoChan(cl.id.String(), func() (any, error) { return c.load(cl) })
	return l, nil
}

// startLocked adds a call, which joinLocked has singleflight run.
func (c *Cache) startLocked(id callID, stale *entry, q *quota, now time.Time) (*call, error) {
	if c.closed {
		return nil, ErrClosed
	}
	refresh := stale != nil && !id.renewal
	if err := q.admit(refresh, now); err != nil {
		c.stats.Rejections++
		return nil, err
	}
	id.Resource = strings.Clone(id.Resource) // it is part of a request, which must not be kept
	cl := &call{id: id, quota: q, stale: stale}
	cl.ctx, cl.cancel = context.WithCancel(c.ctx)
	c.calls[id] = cl
	q.calls++
	c.background.Add(1)
	c.stats.Fetches[id.reason(stale)]++
	if stale != nil && id.renewal {
		stale.renewedAt = now
	}
	return cl, nil
}

// waitLocked is joinLocked for a request that will wait.
func (c *Cache) waitLocked(ctx context.Context, id callID, stale *entry, caller netip.Addr, now time.Time) (*loading, error) {
	l, err := c.joinLocked(id, stale, caller, now)
	if err == nil && len(l.call.traced) < maxTraced {
		if span := trace.SpanContextFromContext(ctx); span.IsValid() {
			l.call.traced = append(l.call.traced, span)
		}
	}
	return l, err
}

// leave is for a caller that waits no more. A call that is left by all goes on, so that
// its token is there when they come back, unless there are too many of those.
func (c *Cache) leave(cl *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl.waiting--; cl.waiting > 0 || c.calls[cl.id] != cl {
		return
	}
	unattended := 0
	for _, other := range c.calls {
		if other.waiting == 0 {
			unattended++
		}
	}
	if unattended > maxUnattended {
		c.forgetLocked(cl)
	}
}

// forgetLocked ends a call; later callers start a new one.
func (c *Cache) forgetLocked(cl *call) {
	cl.cancel()
	if c.calls[cl.id] != cl {
		return
	}
	delete(c.calls, cl.id)
	c.group.Forget(cl.id.String())
	cl.quota.calls--
	c.wakeRefresher() // it may have waited for this one to end
}

// wait returns what the call brings.
func (c *Cache) wait(ctx context.Context, l *loading) (*Token, Source, error) {
	defer c.leave(l.call)
	patience := time.NewTimer(maxPatience)
	defer patience.Stop()
	var err error
	select {
	case r := <-l.result:
		if r.Err == nil {
			return r.Val.(*entry).token, l.source, nil //nolint:errcheck // load returns nothing else
		}
		err = r.Err
	case <-patience.C:
		err = ErrBusy
	case <-ctx.Done():
		return nil, l.source, ctx.Err()
	}
	if errors.Is(err, ErrBusy) {
		c.mu.Lock()
		c.stats.Rejections++
		c.mu.Unlock()
		_, backlog := classOf(err)
		return nil, l.source, &Failure{Class: l.busy, RetryAfter: max(backlog, time.Second), Err: ErrBusy}
	}
	return nil, l.source, err
}

// load fetches a call's token, and stores it or its failure.
func (c *Cache) load(cl *call) (*entry, error) {
	defer c.background.Done()
	token, err := c.fetchToken(cl)
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	cancelled := cl.ctx.Err() != nil
	c.forgetLocked(cl)
	switch {
	case err == nil:
		cl.quota.succeeded(now)
		if cl.dropped {
			return newEntry(cl.id.Key, token, now, 0), nil
		}
		return c.storeLocked(cl, token, now), nil
	case c.ctx.Err() != nil:
		return nil, ErrClosed
	case cancelled, errors.Is(err, ErrBusy): // which say nothing of the key
		return nil, err
	default:
		return nil, c.failLocked(cl, err, now)
	}
}

func (c *Cache) fetchToken(cl *call) (token *Token, err error) {
	// singleflight would end the process for a panic.
	defer func() {
		if p := recover(); p != nil {
			token, err = nil, fmt.Errorf("fetching a token panicked: %v", p)
		}
	}()
	token, err = c.fetch(cl.ctx, Request{
		Key: cl.id.Key, Fresh: cl.id.renewal,
		Waiting: func() ([]netip.Addr, time.Time) {
			c.mu.Lock()
			defer c.mu.Unlock()
			return cl.callers, cl.until
		},
		Requests: func() (int, []trace.SpanContext) {
			c.mu.Lock()
			defer c.mu.Unlock()
			return cl.waiting, cl.traced
		},
	})
	if err == nil && !time.Now().Before(token.ExpiresOn) {
		return nil, fmt.Errorf("the upstream's token expired at %s, before it arrived; check the node's clock",
			token.ExpiresOn.UTC().Format(time.RFC3339))
	}
	return token, err
}

// failLocked remembers that a fetch has failed. A token that is still valid stays.
func (c *Cache) failLocked(cl *call, err error, now time.Time) *Failure {
	class, wait := classOf(err)
	c.stats.Failures[class]++
	if class == Refused {
		cl.quota.refused(now)
	}
	e, ok := c.entries.Peek(cl.id.Key)
	if !ok || e.freshness(now) == expired {
		return c.failed.record(cl.id.Key, err, now)
	}
	if wait >= e.left(now) {
		_ = c.failed.record(cl.id.Key, err, now) // for when the token has expired
	}
	again := max(renewPause, wait)
	if cl.id.renewal { // more would let any caller delay the refreshes
		e.delayRefresh(now.Add(wait))
	} else {
		e.backOff(now, wait)
		again = e.notBefore.Sub(now)
	}
	return &Failure{Class: class, RetryAfter: again, Err: err}
}
