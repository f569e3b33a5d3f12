package tokencache

import (
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxCalls bounds the fetches under way that one caller started.
	maxCalls = 20
	// callerRate is how many new tokens a caller may have fetched a second, and
	// callerBurst how many at once: a pod that starts needs a few, and only one that
	// makes up resources needs more. Four such pods would be needed to use up what the
	// agent may ask of IMDS.
	callerRate  = 5
	callerBurst = maxCalls
	// A caller whose fetches were refused more than toleratedRefusals times in a row
	// has its rate halved with each further one, maxHalvings times at most: to one in
	// 3.2 s. A pod with a few wrong keys, each tried again every refusedFor, stays
	// below that, so that its good keys are fetched at once.
	toleratedRefusals = 4
	maxHalvings       = 4
	// maxQuotas is how many callers are remembered: more than a node has pods. One that
	// is forgotten starts anew.
	maxQuotas = 1024
)

// quota limits the fetches that one caller starts. Hits, joining another's fetch, and
// refreshes of a valid token cost nothing: the last are bounded by the number of tokens
// in memory. The cache's mutex guards it.
type quota struct {
	rate     *rate.Limiter
	refusals int // in a row
	calls    int // under way
	// unlimited is true of the node itself, which asks for many pods, and of the
	// refresher.
	unlimited bool
}

func (c *Cache) quotaLocked(caller netip.Addr) *quota {
	q, ok := c.quotas.Get(caller)
	if !ok {
		q = &quota{rate: rate.NewLimiter(callerRate, callerBurst), unlimited: !caller.IsValid() || caller == refresher}
		c.quotas.Add(caller, q)
	}
	return q
}

// admit says why the caller may not start a fetch now, or charges it.
func (q *quota) admit(refresh bool, now time.Time) error {
	switch {
	case q.unlimited:
		return nil
	case q.calls >= maxCalls:
		return &Failure{Class: Throttled, RetryAfter: maxCalls * time.Second / callerRate, Err: ErrBusy}
	case refresh:
		return nil
	}
	reserved := q.rate.ReserveN(now, 1)
	wait := reserved.DelayFrom(now)
	if wait == 0 {
		return nil
	}
	reserved.CancelAt(now)
	return &Failure{Class: Throttled, RetryAfter: max(wait, time.Second), Err: &rateError{
		refusals: q.refusals, interval: time.Duration(float64(time.Second) / float64(q.rate.Limit())),
	}}
}

// refused notes that a fetch which the caller started was refused.
func (q *quota) refused(now time.Time) {
	q.refusals++
	halvings := min(max(q.refusals-toleratedRefusals, 0), maxHalvings)
	q.rate.SetLimitAt(now, rate.Limit(float64(callerRate)/float64(int(1)<<halvings)))
}

// succeeded notes that a fetch which the caller started brought a token. It forgives
// all refusals.
func (q *quota) succeeded(now time.Time) {
	if q.refusals > 0 {
		q.refusals = 0
		q.rate.SetLimitAt(now, callerRate)
	}
}

// rateError means that a caller asks for new tokens faster than it may.
type rateError struct {
	refusals int           // in a row
	interval time.Duration // between two fetches
}

func (e *rateError) Error() string {
	if e.refusals <= toleratedRefusals {
		return fmt.Sprintf("the pod asks for more than %d new tokens a second", callerRate)
	}
	return fmt.Sprintf("the pod's last %d requests for new tokens were refused; it is limited to one every %s", e.refusals, e.interval)
}
