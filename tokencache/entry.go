package tokencache

import (
	"net/netip"
	"time"
)

// freshness says what may be done with a stored token at a given moment.
type freshness int

const (
	expired  freshness = iota // never served
	expiring                  // a refresh is waited for; served if that fails or is slow
	due                       // served, and refreshed in the background
	fresh                     // served
)

const (
	// longLived separates tokens that are refreshed half-way (managed
	// identities get 24 hours) from those refreshed shortly before the end.
	longLived = 2 * time.Hour
	// expiryWindow is before a token's end: the Azure SDKs themselves ask for a new
	// one within it, so what they are given then should be new.
	expiryWindow = 5 * time.Minute
	// refreshBackoff is the least time between two refreshes of one key, so that a token
	// which comes close to its end does not make every request an upstream call;
	// and between two tries when they fail, doubled each time.
	refreshBackoff    = 30 * time.Second
	maxRefreshBackoff = 5 * time.Minute
)

// entry is a stored token. The cache's mutex guards the second part of its fields; the
// others are immutable.
type entry struct {
	key   Key
	token *Token
	// deadline is when the token expires by the monotonic clock. ExpiresOn says so
	// by the wall clock; whichever comes first ends it, so that setting the clock
	// back does not bring a token back to life.
	deadline  time.Time
	refreshAt time.Time // due from here on
	// freshUntil is when the token stops being fresh, by each clock: what most calls
	// of freshness need to know.
	freshUntil struct{ monotonic, wall time.Time }
	owner      netip.Addr // whose fetch brought the key's first token

	users     map[netip.Addr]struct{} // callers that were given the key's token; kept when it is refreshed
	lastUser  netip.Addr              // one of users; most keys have no other
	demanded  bool                    // given to a caller when it was due
	notBefore time.Time               // no refresh before that
	failures  int                     // refreshes in a row
	renewedAt time.Time               // when a renewal last began; zero for never
}

// newEntry returns an entry for a token received at now. jitter, from 0 to 1, is drawn
// once: tokens that were stored together are not refreshed together.
func newEntry(key Key, token *Token, now time.Time, jitter float64) *entry {
	life := token.ExpiresOn.Sub(now)
	if token.ExpiresIn > 0 {
		life = min(life, token.ExpiresIn)
	}
	e := &entry{
		key: key, token: token, deadline: now.Add(life),
		notBefore: now.Add(refreshBackoff),
		users:     make(map[netip.Addr]struct{}),
	}
	spread := func(most time.Duration) time.Duration { return time.Duration(jitter * float64(most)) }
	switch {
	case !token.RefreshOn.IsZero(): // not before, for it is the issuer's wish
		e.refreshAt = now.Add(token.RefreshOn.Sub(now) + spread(life/20)) // by the monotonic clock
	case life > longLived:
		e.refreshAt = now.Add(life/2 - spread(life/20))
	default:
		e.refreshAt = e.deadline.Add(-expiryWindow - spread(expiryWindow))
	}
	e.setFreshUntil()
	return e
}

func (e *entry) setFreshUntil() {
	e.freshUntil.wall = e.token.ExpiresOn.Add(-expiryWindow).Round(0)
	e.freshUntil.monotonic = e.deadline.Add(-expiryWindow)
	if e.refreshAt.Before(e.freshUntil.monotonic) {
		e.freshUntil.monotonic = e.refreshAt
	}
}

// left is how long the token is good for: by the clock that says less.
func (e *entry) left(now time.Time) time.Duration {
	return min(e.deadline.Sub(now), e.token.ExpiresOn.Round(0).Sub(now)) // Round leaves the wall clock's reading alone
}

// freshness is a pure function of the entry and the time.
func (e *entry) freshness(now time.Time) freshness {
	if now.Before(e.freshUntil.monotonic) && now.Before(e.freshUntil.wall) {
		return fresh
	}
	switch left := e.left(now); {
	case left <= 0:
		return expired
	case left <= expiryWindow:
		return expiring
	default:
		return due
	}
}

// backOff notes at now that a refresh has failed, after which the upstream wants to be
// left alone for wait.
func (e *entry) backOff(now time.Time, wait time.Duration) {
	delay := min(refreshBackoff<<min(e.failures, 10), maxRefreshBackoff)
	e.failures++
	if left := e.left(now); left > expiryWindow {
		delay = min(delay, left-expiryWindow) // once it is expiring, it is tried at once
	} else {
		delay = refreshBackoff
	}
	e.delayRefresh(now.Add(max(delay, wait)))
}

func (e *entry) delayRefresh(until time.Time) {
	if until.After(e.notBefore) {
		e.notBefore = until
	}
}

// nextCheck is when the entry is next to be refreshed, or removed.
func (e *entry) nextCheck(now time.Time) time.Time {
	end := now.Add(e.left(now))
	next := end.Add(-expiryWindow)
	if e.refreshAt.Before(next) {
		next = e.refreshAt
	}
	if next.Before(e.notBefore) {
		next = e.notBefore
	}
	if next.Before(end) && next.After(now) {
		return next
	}
	return end
}

// maxUsers is as many pods as a node has. Fewer are not enough: in a rollout those few
// are gone when the token is due, and the later ones were not noted.
const maxUsers = 250

// addUser notes a caller that is given the token.
func (e *entry) addUser(caller netip.Addr) {
	if caller != e.lastUser && caller.IsValid() && caller != refresher && len(e.users) < maxUsers {
		e.users[caller] = struct{}{}
		e.lastUser = caller
	}
}
