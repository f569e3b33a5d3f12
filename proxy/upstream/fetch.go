package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

// fetchTimeout is for one fetch, its retries included, from when it has its first slot.
// It stands still while a retry waits for its slot.
const fetchTimeout = 10 * time.Second

var errFetchTimeout = fmt.Errorf("%w after %s", context.DeadlineExceeded, fetchTimeout)

// slotLimiter is a *limiter.Limiter, whose slots tests count.
type slotLimiter interface {
	Acquire(ctx context.Context, since time.Time, waiting func() ([]netip.Addr, time.Time)) (release func(retryAfter time.Duration), err error)
	Backlog() time.Duration
	PausedUntil() time.Time
	PauseUntil(until time.Time)
	SetLimits(perSecond, atOnce int)
	Settle(ctx context.Context) error
	Stats() limiter.Stats
}

// fetch is one fetch of a token: its slots and its deadline, and what its tries share.
type fetch struct {
	limiter slotLimiter
	counts  *counts
	waiting func() ([]netip.Addr, time.Time)
	since   time.Time // the fetch has been wanted
	cancel  context.CancelCauseFunc
	timer   *time.Timer // calls cancel
	ends    time.Time

	began time.Time // the first try
	tries int
	last  error // why the last try brought nothing, unless ctx ended it
}

// newFetch returns a fetch and its context. fetchTimeout also bounds what comes before
// its first slot, but for the wait.
func newFetch(ctx context.Context, l slotLimiter, c *counts, req tokencache.Request) (context.Context, *fetch) {
	now := time.Now()
	f := &fetch{limiter: l, counts: c, waiting: req.Waiting, since: now, ends: now.Add(fetchTimeout)}
	ctx, f.cancel = context.WithCancelCause(ctx)
	f.timer = time.AfterFunc(fetchTimeout, func() { f.cancel(errFetchTimeout) })
	return ctx, f
}

// slot waits for a slot for the next try. release is limiter.Limiter's.
func (f *fetch) slot(ctx context.Context) (release func(retryAfter time.Duration), err error) {
	f.timer.Stop()
	began := time.Now()
	left := f.ends.Sub(began)
	spent := fetchTimeout - left // otherwise than in the queue
	release, err = f.limiter.Acquire(ctx, f.since, func() ([]netip.Addr, time.Time) {
		callers, until := f.waiting()
		return callers, until.Add(spent)
	})
	first := f.began.IsZero()
	if first {
		left = fetchTimeout
	}
	now := time.Now()
	f.counts.waits.Record(now.Sub(began))
	f.ends = now.Add(left)
	f.timer.Reset(left)
	var paused *limiter.PausedError
	switch {
	case err == nil && first:
		f.began = now
	case errors.As(err, &paused):
		err = &slotError{tokencache.Throttled, paused.For, err}
	case first && errors.Is(err, limiter.ErrTimeout):
		err = &slotError{tokencache.Unavailable, f.limiter.Backlog(), tokencache.ErrBusy}
	}
	return release, err
}

// turnTo makes the next slot one of another limiter, with all of fetchTimeout for what follows.
func (f *fetch) turnTo(l slotLimiter) { f.limiter, f.began = l, time.Time{} }

// end releases the fetch's context.
func (f *fetch) end() {
	f.timer.Stop()
	f.cancel(nil)
}

// slotError is why a fetch had no slot.
type slotError struct {
	class tokencache.Class
	wait  time.Duration
	error
}

func (e *slotError) Unwrap() error { return e.error }

// Class is what tokencache looks for.
func (e *slotError) Class() tokencache.Class { return e.class }

// Wait is what tokencache looks for.
func (e *slotError) Wait() time.Duration { return e.wait }
