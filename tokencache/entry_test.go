package tokencache

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestFreshness(t *testing.T) {
	begin := time.Now()
	of := func(life time.Duration, jitter float64) *entry {
		return newEntry(key, &Token{ExpiresOn: begin.Add(life).Round(0)}, begin, jitter)
	}
	asIssued := func(left, in time.Duration) *entry { // the node's clock is off by the difference
		return newEntry(key, &Token{ExpiresOn: begin.Add(left).Round(0), ExpiresIn: in}, begin, 0)
	}
	wished := newEntry(key, &Token{ExpiresOn: begin.Add(24 * time.Hour).Round(0), RefreshOn: begin.Add(time.Hour)}, begin, 0.5)
	for name, tc := range map[string]struct {
		entry *entry
		at    map[time.Duration]freshness
	}{
		"a day": {of(24*time.Hour, 0), map[time.Duration]freshness{
			0: fresh, 12*time.Hour - 1: fresh, 12 * time.Hour: due, 24*time.Hour - 5*time.Minute - 1: due,
			24*time.Hour - 5*time.Minute: urgent, 24*time.Hour - 1: urgent, 24 * time.Hour: expired, 1000 * time.Hour: expired,
		}},
		"a day, drawn early": {of(24*time.Hour, 1), map[time.Duration]freshness{
			10*time.Hour + 48*time.Minute - 1: fresh, 10*time.Hour + 48*time.Minute: due,
		}},
		"an hour": {of(time.Hour, 0), map[time.Duration]freshness{
			55*time.Minute - 1: fresh, 55 * time.Minute: urgent, time.Hour: expired,
		}},
		"an hour, drawn early": {of(time.Hour, 1), map[time.Duration]freshness{
			50*time.Minute - 1: fresh, 50 * time.Minute: due, 55 * time.Minute: urgent,
		}},
		"three minutes":                   {of(3*time.Minute, 0), map[time.Duration]freshness{0: urgent, 3 * time.Minute: expired}},
		"as the issuer wishes, or later":  {wished, map[time.Duration]freshness{time.Hour + 36*time.Minute - 1: fresh, time.Hour + 36*time.Minute: due}},
		"the node's clock an hour behind": {asIssued(25*time.Hour, 24*time.Hour), map[time.Duration]freshness{24*time.Hour - 1: urgent, 24 * time.Hour: expired}},
		"the node's clock an hour ahead":  {asIssued(23*time.Hour, 24*time.Hour), map[time.Duration]freshness{23*time.Hour - 1: urgent, 23 * time.Hour: expired}},
	} {
		for at, want := range tc.at {
			assert.Equal(t, want, tc.entry.freshness(begin.Add(at)), "%s, at %s", name, at)
		}
	}
}

// A clock that is set does so for one reading of a time.Time alone. Here the token's end
// moves instead, which looks the same from where it stands.
func TestAJumpOfTheClockNeverServesAnExpiredToken(t *testing.T) {
	begin := time.Now()
	for name, jump := range map[string]time.Duration{"back": -48 * time.Hour, "ahead": 48 * time.Hour} {
		e := newEntry(key, &Token{ExpiresOn: begin.Add(24 * time.Hour).Round(0)}, begin, 0)
		e.token = &Token{ExpiresOn: e.token.ExpiresOn.Add(-jump)}
		e.freshUntil.wall = e.freshUntil.wall.Add(-jump)
		assert.Equal(t, expired, e.freshness(begin.Add(24*time.Hour)), name)
		want := fresh
		if jump > 0 {
			want = expired
		}
		assert.Equal(t, want, e.freshness(begin.Add(time.Hour)), name)
	}
}

func TestARefreshThatFailsIsPostponed(t *testing.T) {
	begin := time.Now()
	e := newEntry(key, &Token{ExpiresOn: begin.Add(24 * time.Hour).Round(0)}, begin, 0)
	now := begin.Add(12 * time.Hour)
	for _, want := range []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 5 * time.Minute, 5 * time.Minute} {
		e.postpone(now, 0)
		assert.Equal(t, want, e.askAfter.Sub(now))
	}
	e.postpone(now, time.Hour)
	assert.Equal(t, time.Hour, e.askAfter.Sub(now), "Retry-After is honoured")
	now = begin.Add(24*time.Hour - 6*time.Minute)
	e.postpone(now, 0)
	assert.Equal(t, time.Minute, e.askAfter.Sub(now), "tried again as soon as it is urgent")
	now = begin.Add(24*time.Hour - 4*time.Minute)
	e.postpone(now, 0)
	assert.Equal(t, 30*time.Second, e.askAfter.Sub(now))
}

func TestUsersAreFewAndLeave(t *testing.T) {
	var u users
	assert.False(t, u.keep(func(netip.Addr) bool { return true }))
	for i := range 100 {
		u.add(pod(i))
		u.add(pod(0))
	}
	u.add(netip.Addr{})
	assert.Len(t, *u.list.Load(), maxUsers)
	assert.True(t, u.keep(func(a netip.Addr) bool { return a == pod(3) }))
	assert.Equal(t, []netip.Addr{pod(3)}, *u.list.Load())
	assert.False(t, u.keep(func(netip.Addr) bool { return false }))
	u.add(pod(7))
	assert.Equal(t, []netip.Addr{pod(7)}, *u.list.Load())
}
