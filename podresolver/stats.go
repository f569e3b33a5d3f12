package podresolver

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// Outcome is what came of a call of Resolve or ResolveCaller.
type Outcome int

// The outcomes. Those after OutcomeWaited are of requests that no pod was found for.
const (
	OutcomeFound       Outcome = iota // at once
	OutcomeWaited                     // after a wait
	OutcomeUnknown                    // ErrUnknownAddress
	OutcomeAmbiguous                  // ErrAmbiguousAddress
	OutcomeUnconfirmed                // ErrUnconfirmed
	OutcomeUntrusted                  // confirm returned another error
	OutcomeStale                      // ErrStale
	OutcomeNotSynced                  // ErrNotSynced
	OutcomeAbandoned                  // the request's context ended during the wait
	outcomes           = iota
)

// String names the outcome as metrics do.
func (o Outcome) String() string {
	return [...]string{
		OutcomeFound: "found", OutcomeWaited: "waited", OutcomeUnknown: "unknown", OutcomeAmbiguous: "ambiguous", OutcomeUnconfirmed: "unconfirmed",
		OutcomeUntrusted: "untrusted", OutcomeStale: "stale", OutcomeNotSynced: "not_synced", OutcomeAbandoned: "abandoned",
	}[o]
}

// counts is what Stats returns of the past.
type counts struct {
	resolutions                                  [outcomes]atomic.Uint64
	waited                                       atomic.Int64 // nanoseconds
	ambiguous, lookups, lookupHits, lookupErrors atomic.Uint64
}

// resolved counts a resolution: success if err is nil.
func (c *counts) resolved(success Outcome, err error) {
	outcome := success
	switch {
	case err == nil:
	case errors.Is(err, ErrUnconfirmed):
		outcome = OutcomeUnconfirmed
	case errors.Is(err, ErrUnknownAddress):
		outcome = OutcomeUnknown
	case errors.Is(err, ErrAmbiguousAddress):
		outcome = OutcomeAmbiguous
	case errors.Is(err, ErrStale):
		outcome = OutcomeStale
	case errors.Is(err, ErrNotSynced):
		outcome = OutcomeNotSynced
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		outcome = OutcomeAbandoned
	default:
		outcome = OutcomeUntrusted
	}
	c.resolutions[outcome].Add(1)
}

// Stats are counts since New, and the state of the watches.
type Stats struct {
	Addresses    int              // that pods of this node claim, ambiguous ones included
	Ambiguous    uint64           // times that an address became ambiguous
	Lookups      uint64           // times that the API server was asked for the pod of an address
	Found        uint64           // lookups that found a pod before the watch delivered it
	LookupErrors uint64           // lookups that failed
	Resolutions  [outcomes]uint64 // by Outcome
	WaitTime     time.Duration    // of all requests for their pods, in vain or not
	Watches      []Watch
}

// Watch is the state of one watched resource.
type Watch struct {
	Resource string
	StaleFor time.Duration // since the API server last sent something, which it does about once a minute
}

// Stats returns the current counts.
func (r *Resolver) Stats() Stats {
	c := &r.counts
	s := Stats{
		Addresses: len(r.current.Load().byAddr), Ambiguous: c.ambiguous.Load(), WaitTime: time.Duration(c.waited.Load()),
		Lookups: c.lookups.Load(), Found: c.lookupHits.Load(), LookupErrors: c.lookupErrors.Load(),
	}
	for outcome := range c.resolutions {
		s.Resolutions[outcome] = c.resolutions[outcome].Load()
	}
	now := time.Now()
	for _, w := range r.watchers {
		if closed(w.synced) {
			s.Watches = append(s.Watches, Watch{w.resource, w.staleFor(now)})
		}
	}
	return s
}
