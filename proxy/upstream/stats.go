package upstream

import (
	"context"
	"errors"
	"time"

	"github.com/podidentity/nmi/proxy/histogram"
	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

// Outcome is what came of a request for a token.
type Outcome int

// The outcomes other than OK are tokencache's classes.
const (
	OK Outcome = iota
	Refused
	Throttled
	Unavailable
)

// String names the outcome as metrics do.
func (o Outcome) String() string {
	return [...]string{OK: "ok", Refused: "refused", Throttled: "throttled", Unavailable: "unavailable"}[o]
}

// counts are of requests for tokens to one service.
type counts struct {
	durations [Unavailable + 1]histogram.Histogram
	waits     histogram.Histogram
}

// record counts a request, unless it was Close that ended it.
func (c *counts) record(ctx context.Context, took time.Duration, err error) {
	if err == nil || !errors.Is(context.Cause(ctx), context.Canceled) {
		c.durations[outcomeOf(err)].Record(took)
	}
}

func outcomeOf(err error) Outcome {
	var answer *Error
	switch {
	case err == nil:
		return OK
	case !errors.As(err, &answer):
		return Unavailable
	}
	switch answer.Class() {
	case tokencache.Refused:
		return Refused
	case tokencache.Throttled:
		return Throttled
	default:
		return Unavailable
	}
}

// Stats are the requests for tokens, and how their services are.
type Stats struct {
	IMDS, Entra ServiceStats
	Available   bool // see Unavailable
	Shared      bool // see Shared
}

// ServiceStats are the requests for tokens to one service. Those of one fetch from Entra count
// as one.
type ServiceStats struct {
	Durations [Unavailable + 1]histogram.Snapshot // by Outcome
	Waits     histogram.Snapshot                  // for a slot
	Waiting   int                                 // for a slot, now
	InFlight  int                                 // now
}

// Stats returns the counts so far.
func (u *Upstream) Stats() Stats {
	return Stats{
		IMDS: u.imdsCounts.stats(u.imdsLimiter.Stats()), Entra: u.entraCounts.stats(u.entra.limiters.stats()),
		Available: u.Unavailable() == nil, Shared: u.Shared(),
	}
}

func (c *counts) stats(now limiter.Stats) ServiceStats {
	s := ServiceStats{Waits: c.waits.Snapshot(), Waiting: now.Waiting, InFlight: now.InFlight}
	for outcome := range c.durations {
		s.Durations[outcome] = c.durations[outcome].Snapshot()
	}
	return s
}
