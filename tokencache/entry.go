package tokencache

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// freshness says what may be done with a stored token at a given moment.
type freshness int

const (
	expired freshness = iota // never served
	urgent                   // a refresh is waited for; served if that fails or is slow
	due                      // served, and refreshed behind the caller's back
	fresh                    // served
)

const (
	// longLived separates tokens that are refreshed half-way (managed
	// identities get 24 hours) from those refreshed shortly before the end.
	longLived = 2 * time.Hour
	// lastMinutes of a token are urgent: the Azure SDKs themselves ask anew
	// within them, so what they are given then should be new.
	lastMinutes = 5 * time.Minute
	// pause is the least time between two refreshes of one key, so that a token
	// which comes close to its end does not make every request an upstream call;
	// and between two tries when they fail, doubled each time.
	pause    = 30 * time.Second
	maxPause = 5 * time.Minute
)

// entry is a stored token, and when what is done with it.
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
	holder     netip.Addr // whose flight first brought the key's token
	renewed    bool       // it came of a renewal

	touched atomic.Int64 // when it last moved up in the LRU, as time since Cache.began
	asked   atomic.Bool  // somebody was given it when it was due
	users   *users       // handed on from entry to entry

	// The rest is guarded by Cache.mu.

	askAfter   time.Time // no refresh before that
	failed     int       // refreshes in a row
	refreshing bool
	renewedAt  time.Time // when a renewal last began; zero for never
}

// newEntry stores token as received at now. jitter, from 0 to 1, is drawn by the
// caller, once: tokens that were stored together are not refreshed together.
func newEntry(key Key, token *Token, now time.Time, jitter float64) *entry {
	life := token.ExpiresOn.Sub(now)
	if token.ExpiresIn > 0 {
		life = min(life, token.ExpiresIn)
	}
	e := &entry{
		key: key, token: token, deadline: now.Add(life),
		askAfter: now.Add(pause),
		users:    new(users),
	}
	spread := func(most time.Duration) time.Duration { return time.Duration(jitter * float64(most)) }
	switch {
	case !token.RefreshOn.IsZero(): // not before, for it is the issuer's wish
		e.refreshAt = now.Add(token.RefreshOn.Sub(now) + spread(life/20)) // by the monotonic clock
	case life > longLived:
		e.refreshAt = now.Add(life/2 - spread(life/20))
	default:
		e.refreshAt = e.deadline.Add(-lastMinutes - spread(lastMinutes))
	}
	e.setFreshUntil()
	return e
}

func (e *entry) setFreshUntil() {
	e.freshUntil.wall = e.token.ExpiresOn.Add(-lastMinutes).Round(0)
	e.freshUntil.monotonic = e.deadline.Add(-lastMinutes)
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
	case left <= lastMinutes:
		return urgent
	default:
		return due
	}
}

// postpone notes at now that a refresh has failed, after which the upstream wants
// to be left alone for wait. Cache.mu is held.
func (e *entry) postpone(now time.Time, wait time.Duration) {
	delay := min(pause<<min(e.failed, 10), maxPause)
	e.failed++
	if left := e.left(now); left > lastMinutes {
		delay = min(delay, left-lastMinutes) // once it is urgent, it is tried at once
	} else {
		delay = pause
	}
	e.leaveAlone(now.Add(max(delay, wait)))
}

// leaveAlone puts refreshes off. Cache.mu is held.
func (e *entry) leaveAlone(until time.Time) {
	if until.After(e.askAfter) {
		e.askAfter = until
	}
}

// attention is when the entry next needs some: to be refreshed, or removed. Cache.mu
// is held.
func (e *entry) attention(now time.Time) time.Time {
	end := now.Add(e.left(now))
	next := end.Add(-lastMinutes) // urgent
	if e.refreshAt.Before(next) {
		next = e.refreshAt
	}
	if next.Before(e.askAfter) {
		next = e.askAfter
	}
	if next.Before(end) && next.After(now) {
		return next
	}
	return end
}

// users are the callers who were given a key's token.
type users struct{ list atomic.Pointer[[]netip.Addr] }

// maxUsers is what a node has of pods. A bound of a few is not enough: in a rollout
// those few leave, and who has come since was not noted. To look through 250 takes 0.1 µs.
const maxUsers = 250

// add notes a caller. It costs nothing but a look for one who is there already.
func (u *users) add(caller netip.Addr) {
	if !caller.IsValid() {
		return
	}
	for {
		old := u.list.Load()
		if old == nil {
			if u.list.CompareAndSwap(nil, &[]netip.Addr{caller}) {
				return
			}
			continue
		}
		if slices.Contains(*old, caller) || len(*old) >= maxUsers {
			return
		}
		longer := append(slices.Clip(*old), caller)
		if u.list.CompareAndSwap(old, &longer) {
			return
		}
	}
}

// keep drops the users for whom alive is false, and reports whether any is left.
func (u *users) keep(alive func(netip.Addr) bool) bool {
	old := u.list.Load()
	if old == nil {
		return false
	}
	kept := slices.DeleteFunc(slices.Clone(*old), func(a netip.Addr) bool { return !alive(a) })
	if len(kept) == len(*old) {
		return true
	}
	if len(kept) == 0 {
		u.list.CompareAndSwap(old, nil)
		return false
	}
	u.list.CompareAndSwap(old, &kept)
	return true
}
