package tokencache

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// Stats is a snapshot of what the cache has done since it was made.
type Stats struct {
	// Answered from memory: with a fresh token, one that was due, and one in its last
	// minutes.
	Fresh, Due, Urgent uint64

	Misses     uint64 // no token was in memory
	Remembered uint64 // told of a failure from memory
	TurnedAway uint64 // not served because too much was asked of the upstream

	Flights   uint64 // fetches, whatever for
	Joined    uint64 // waited for a flight that another caller had started
	Refreshes uint64 // flights in the place of a token that was still good
	Renewals  uint64 // a caller did not want the token in memory, and waited for another
	Evictions uint64 // tokens that had to leave for others

	Failures [3]uint64 // fetches that brought no token, by Class

	Entries int // tokens held now
	Failing int // keys whose last fetch has failed, of late
}

type counters struct {
	fresh                                striped
	due, urgent                          atomic.Uint64
	misses, remembered, turnedAway       atomic.Uint64
	flights, joined, refreshes, renewals atomic.Uint64
	evictions                            atomic.Uint64
	failures                             [3]atomic.Uint64
}

// striped is a counter that most callers can add to without waiting for each other: it
// is the only thing that a hit of a fresh token writes to.
type striped [16]struct {
	atomic.Uint64
	_ [56]byte // a cache line each
}

func (s *striped) add(caller netip.Addr) {
	last := caller.As16()[15]
	s[int(last)%len(s)].Add(1)
}

func (s *striped) load() (sum uint64) {
	for i := range s {
		sum += s[i].Load()
	}
	return sum
}

// Stats returns the counters as they are now.
func (c *Cache) Stats() Stats {
	s := Stats{
		Fresh: c.stats.fresh.load(), Due: c.stats.due.Load(), Urgent: c.stats.urgent.Load(),
		Misses: c.stats.misses.Load(), Remembered: c.stats.remembered.Load(), TurnedAway: c.stats.turnedAway.Load(),
		Flights: c.stats.flights.Load(), Joined: c.stats.joined.Load(),
		Refreshes: c.stats.refreshes.Load(), Renewals: c.stats.renewals.Load(), Evictions: c.stats.evictions.Load(),
		Entries: len(*c.byKey.Load()), Failing: c.failures.standing(time.Now()),
	}
	for class := range s.Failures {
		s.Failures[class] = c.stats.failures[class].Load()
	}
	return s
}
