package tokencache

import (
	"fmt"
	"net/netip"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/time/rate"
)

const (
	// callerRate is how many new tokens a caller may have fetched a second, and
	// callerBurst how many at once: a pod that starts needs a few, and only one that
	// makes up resources needs more. Four such pods would be needed to use up what the
	// agent may ask of IMDS.
	callerRate  = 5
	callerBurst = maxFlights
	// A caller whose fetches were refused more than toleratedRefusals times in a row
	// has its rate halved with each further one, maxHalvings times at most: to one in
	// 3.2 s. A pod with a few wrong keys, each tried again every refusedFor, stays
	// below that, so that its good keys are fetched at once.
	toleratedRefusals = 4
	maxHalvings       = 4
	// maxBudgets is how many callers are remembered: more than a node has pods. One
	// that is forgotten starts anew.
	maxBudgets = 1024
)

// budgets limit how many fetches each caller starts. Hits, callers who join another's
// fetch, and refreshes of a token that is still good cost nothing: the last are bounded
// by the number of tokens held. The lock is Cache.mu.
type budgets struct {
	byCaller *lru.Cache[netip.Addr, *budget]
}

// budget is the token bucket of one caller.
type budget struct {
	*rate.Limiter
	refused int // fetches that were refused in a row
}

func newBudgets() budgets {
	byCaller, err := lru.New[netip.Addr, *budget](maxBudgets)
	if err != nil { // only for a size below 1
		panic(err)
	}
	return budgets{byCaller}
}

// limited reports whether a caller has a budget. The node's own requests are made for
// many pods, and refreshes for none.
func limited(caller netip.Addr) bool { return caller.IsValid() && caller != refresher }

func (b budgets) of(caller netip.Addr) *budget {
	own, ok := b.byCaller.Get(caller)
	if !ok {
		own = &budget{Limiter: rate.NewLimiter(callerRate, callerBurst)}
		b.byCaller.Add(caller, own)
	}
	return own
}

// spend takes one fetch out of the caller's budget, or returns an *overRateError.
func (b budgets) spend(caller netip.Addr, now time.Time) *overRateError {
	if !limited(caller) {
		return nil
	}
	own := b.of(caller)
	reserved := own.ReserveN(now, 1)
	wait := reserved.DelayFrom(now)
	if wait == 0 {
		return nil
	}
	reserved.CancelAt(now)
	return &overRateError{wait: wait, refused: own.refused, interval: time.Duration(float64(time.Second) / float64(own.Limit()))}
}

// refused notes that a fetch which the caller started was refused.
func (b budgets) refused(caller netip.Addr, now time.Time) {
	if !limited(caller) {
		return
	}
	own := b.of(caller)
	own.refused++
	halvings := min(max(own.refused-toleratedRefusals, 0), maxHalvings)
	own.SetLimitAt(now, rate.Limit(float64(callerRate)/float64(int(1)<<halvings)))
}

// succeeded notes that a fetch which the caller started brought a token. It forgives
// all refusals.
func (b budgets) succeeded(caller netip.Addr, now time.Time) {
	if own, ok := b.byCaller.Peek(caller); ok && own.refused > 0 {
		own.refused = 0
		own.SetLimitAt(now, callerRate)
	}
}

// overRateError means that a caller asks for new tokens faster than it may.
type overRateError struct {
	wait     time.Duration // until it may start a fetch again
	interval time.Duration // between two
	refused  int           // of its last fetches, in a row
}

func (e *overRateError) Error() string {
	if e.refused <= toleratedRefusals {
		return fmt.Sprintf("the pod asks for more than %d new tokens a second", callerRate)
	}
	return fmt.Sprintf("the pod's last %d requests for new tokens were refused, so that it may make one in %s", e.refused, e.interval)
}
