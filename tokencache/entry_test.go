package tokencache

import (
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
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
			24*time.Hour - 5*time.Minute: expiring, 24*time.Hour - 1: expiring, 24 * time.Hour: expired, 1000 * time.Hour: expired,
		}},
		"a day, drawn early": {of(24*time.Hour, 1), map[time.Duration]freshness{
			10*time.Hour + 48*time.Minute - 1: fresh, 10*time.Hour + 48*time.Minute: due,
		}},
		"an hour": {of(time.Hour, 0), map[time.Duration]freshness{
			55*time.Minute - 1: fresh, 55 * time.Minute: expiring, time.Hour: expired,
		}},
		"an hour, drawn early": {of(time.Hour, 1), map[time.Duration]freshness{
			50*time.Minute - 1: fresh, 50 * time.Minute: due, 55 * time.Minute: expiring,
		}},
		"two hours are not long":          {of(2*time.Hour, 0), map[time.Duration]freshness{115*time.Minute - 1: fresh, 115 * time.Minute: expiring}},
		"three minutes":                   {of(3*time.Minute, 0), map[time.Duration]freshness{0: expiring, 3 * time.Minute: expired}},
		"as the issuer wishes, or later":  {wished, map[time.Duration]freshness{time.Hour + 36*time.Minute - 1: fresh, time.Hour + 36*time.Minute: due}},
		"the node's clock an hour behind": {asIssued(25*time.Hour, 24*time.Hour), map[time.Duration]freshness{24*time.Hour - 1: expiring, 24 * time.Hour: expired}},
		"the node's clock an hour ahead":  {asIssued(23*time.Hour, 24*time.Hour), map[time.Duration]freshness{23*time.Hour - 1: expiring, 23 * time.Hour: expired}},
	} {
		for at, want := range tc.at {
			assert.Equal(t, want, tc.entry.freshness(begin.Add(at)), "%s, at %s", name, at)
		}
	}
}

// set is what now reads once the wall clock has been set by so much.
func set(now time.Time, by time.Duration) time.Time {
	now = now.Add(by)
	// Nothing but a clock that is set moves one reading of a time.Time alone.
	(*struct {
		wall uint64
		ext  int64 // the monotonic clock's
		loc  *time.Location
	})(unsafe.Pointer(&now)).ext -= int64(by)
	return now
}

func TestClockChangesNeverServeAnExpiredToken(t *testing.T) {
	begin := time.Now()
	end := begin.Add(24 * time.Hour)
	require.Equal(t, time.Hour, set(begin, time.Hour).Round(0).Sub(begin.Round(0)))
	require.Zero(t, set(begin, time.Hour).Sub(begin))
	for name, token := range map[string]*Token{
		"plain":                         {ExpiresOn: end.Round(0)},
		"with a wish":                   {ExpiresOn: end.Round(0), RefreshOn: begin.Add(12 * time.Hour).Round(0)},
		"reckoned from its life":        {ExpiresOn: end, ExpiresIn: 24 * time.Hour},
		"both reckoned from a duration": {ExpiresOn: end, RefreshOn: begin.Add(12 * time.Hour)},
	} {
		e := newEntry(key, token, begin, 0)
		for _, tc := range []struct {
			at, jump time.Duration
			want     freshness
		}{
			{time.Hour, -48 * time.Hour, fresh},
			{13 * time.Hour, -48 * time.Hour, due},
			{24*time.Hour - 1, -48 * time.Hour, expiring},
			{24 * time.Hour, -48 * time.Hour, expired},
			{time.Hour, 48 * time.Hour, expired},
			{time.Hour, 23 * time.Hour, expired},
			{time.Hour, 23*time.Hour - time.Minute, expiring},
		} {
			assert.Equal(t, tc.want, e.freshness(set(begin.Add(tc.at), tc.jump)), "%s, at %s, set by %s", name, tc.at, tc.jump)
		}
	}
}

func TestRefreshBackoff(t *testing.T) {
	begin := time.Now()
	e := newEntry(key, &Token{ExpiresOn: begin.Add(24 * time.Hour).Round(0)}, begin, 0)
	now := begin.Add(12 * time.Hour)
	for _, want := range []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 5 * time.Minute, 5 * time.Minute} {
		e.backOff(now, 0)
		assert.Equal(t, want, e.notBefore.Sub(now))
	}
	e.backOff(now, time.Hour)
	assert.Equal(t, time.Hour, e.notBefore.Sub(now), "Retry-After is honoured")
	now = begin.Add(24*time.Hour - 6*time.Minute)
	e.backOff(now, 0)
	assert.Equal(t, time.Minute, e.notBefore.Sub(now), "tried again as soon as it is expiring")
	now = begin.Add(24*time.Hour - 4*time.Minute)
	e.backOff(now, 0)
	assert.Equal(t, 30*time.Second, e.notBefore.Sub(now))
}

func TestUsersAreBounded(t *testing.T) {
	e := newEntry(key, &Token{ExpiresOn: time.Now().Add(time.Hour)}, time.Now(), 0)
	for i := range 2 * maxUsers {
		e.addUser(pod(i))
		e.addUser(pod(0))
	}
	assert.Len(t, e.users, maxUsers)
	e = newEntry(key, e.token, time.Now(), 0)
	e.addUser(netip.Addr{})
	e.addUser(refresher)
	assert.Empty(t, e.users)
}

func TestUsersThatAreGoneAreRemoved(t *testing.T) {
	node := &inUse{gone: map[netip.Addr]bool{alice: true}}
	c := New((&fakeUpstream{}).fetch, Config{InUse: node.ask})
	defer c.Close()
	e := newEntry(key, &Token{ExpiresOn: time.Now().Add(time.Hour)}, time.Now(), 0)
	assert.False(t, c.wanted(e))
	e.addUser(alice)
	e.addUser(bob)
	assert.True(t, c.wanted(e))
	assert.Equal(t, map[netip.Addr]struct{}{bob: {}}, e.users)
	node.leave(bob)
	assert.False(t, c.wanted(e))
	assert.Empty(t, e.users)
	e.addUser(bob)
	assert.Len(t, e.users, 1, "one that comes back is noted again")
	e.demanded = true
	assert.True(t, c.wanted(e))
}
