package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// drawn makes all tokens be refreshed at the same point of their life.
func drawn(c *Cache, jitter float64) *Cache {
	c.jitter = func() float64 { return jitter }
	return c
}

// TestTimeline follows one key through its life, with the exact number of
// upstream calls at each step.
func TestTimeline(t *testing.T) {
	down := errors.New("upstream is down")
	throttled := classed{Throttled, 10 * time.Minute}
	refused := classed{class: Refused}
	type step struct {
		at    time.Duration // since the first request
		err   error         // of the upstream, from here on
		want  string        // "" means an error; "-" that nobody asks
		calls int           // upstream calls so far, refreshes included
	}
	const h, m, s = time.Hour, time.Minute, time.Second
	for name, tc := range map[string]struct {
		life  time.Duration
		steps []step
	}{
		"a day's token is refreshed half-way, behind the caller": {24 * h, []step{
			{0, nil, "token-1", 1},
			{12*h - s, nil, "token-1", 1},
			{12 * h, nil, "token-1", 2},
			{12*h + s, nil, "token-2", 2},
			{30 * h, nil, "token-2", 3},
		}},
		"an hour's token in its last minutes, and waited for then": {h, []step{
			{0, nil, "token-1", 1},
			{55*m - s, nil, "token-1", 1},
			{55 * m, nil, "token-2", 2},
			{56 * m, nil, "token-2", 2},
		}},
		"an expired token is never served": {h, []step{
			{0, nil, "token-1", 1},
			{h, nil, "token-2", 2},
			{2 * h, down, "", 3},
			{2*h + s, nil, "token-4", 4},
		}},
		"a refresh that fails keeps the old token, and is tried again later and later": {24 * h, []step{
			{0, nil, "token-1", 1},
			{12 * h, down, "token-1", 2},
			{12*h + 29*s, down, "token-1", 2},
			{12*h + 30*s, down, "-", 3},
			{12*h + 89*s, down, "token-1", 3},
			{12*h + 90*s, down, "token-1", 4},
			{12*h + 209*s, down, "token-1", 4},
			{12*h + 210*s, down, "-", 5},
			{12*h + 450*s, down, "-", 6},
			{12*h + 750*s, nil, "-", 7},
			{12*h + 751*s, nil, "token-7", 7},
		}},
		"Retry-After is honoured for a refresh": {24 * h, []step{
			{0, nil, "token-1", 1},
			{12 * h, throttled, "token-1", 2},
			{12*h + 10*m - s, nil, "token-1", 2},
			{12*h + 10*m, nil, "-", 3},
			{12*h + 10*m + s, nil, "token-3", 3},
		}},
		"urgent, and the upstream down: the old token until it expires": {24 * h, []step{
			{0, nil, "token-1", 1},
			{24*h - 5*m, down, "token-1", 2},
			{24*h - 4*m - 31*s, down, "token-1", 2},
			{24*h - 4*m - 30*s, down, "token-1", 3},
			{24*h - s, down, "token-1", 4},
			{24 * h, down, "", 5},
			{24*h + s - 1, down, "", 5},
			{24*h + s, down, "", 6},
			{24*h + 3*s, down, "", 7},
			{24*h + 7*s, nil, "token-8", 8},
		}},
		"a token that comes close to its end does not make each request a call": {m, []step{
			{0, nil, "token-1", 1},
			{29 * s, nil, "token-1", 1},
			{30 * s, nil, "token-2", 2},
			{31 * s, nil, "token-2", 2},
		}},
		"a refusal is remembered for ten seconds": {h, []step{
			{0, refused, "", 1},
			{s, nil, "", 1},
			{10*s - 1, nil, "", 1},
			{10 * s, refused, "", 2},
			{20 * s, nil, "token-3", 3},
		}},
		"a throttle for as long as it says": {h, []step{
			{0, throttled, "", 1},
			{10*m - s, nil, "", 1},
			{10 * m, nil, "token-2", 2},
		}},
		"a passing failure for 1, 2, 4 … 30 s": {h, []step{
			{0, down, "", 1},
			{s - 1, down, "", 1},
			{s, down, "", 2},
			{3 * s, down, "", 3},
			{7 * s, down, "", 4},
			{15 * s, down, "", 5},
			{31 * s, down, "", 6},
			{61*s - 1, down, "", 6},
			{61 * s, down, "", 7},
			{3 * m, down, "", 8}, // long ago: it counts from one again
			{3*m + s, nil, "token-9", 9},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				up := &fakeUpstream{life: tc.life}
				c := drawn(New(up.fetch, Config{}), 0)
				defer c.Close()
				begin := time.Now()
				for _, s := range tc.steps {
					up.fail(s.err)
					time.Sleep(s.at - time.Since(begin))
					if s.want != "-" {
						token, err := c.Get(t.Context(), key, alice)
						if s.want == "" {
							require.Error(t, err, "at %s", s.at)
						} else {
							require.NoError(t, err, "at %s", s.at)
							require.Equal(t, s.want, token.AccessToken, "at %s", s.at)
						}
					}
					synctest.Wait() // a refresh, if one was sent off, lands
					require.Equal(t, s.calls, up.asked(), "calls at %s", s.at)
				}
			})
		})
	}
}

func TestManyCallersOfADueTokenStartOneRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: time.Second, turns: true}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		time.Sleep(13 * time.Hour)
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { assert.Equal(t, "token-1", get(t, c)) })
		}
		wg.Wait()
		time.Sleep(time.Minute)
		assert.Equal(t, 2, up.asked())
		assert.Equal(t, "token-2", get(t, c))
		assert.Equal(t, Stats{Fresh: 1, Due: 1000, Misses: 1, Flights: 2, Refreshes: 1, Entries: 1}, c.Stats())
	})
}

func TestAnUrgentTokenIsServedWhenItsRefreshIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(56 * time.Minute)
		up.slow(3 * time.Second)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				begin := time.Now()
				assert.Equal(t, "token-1", get(t, c))
				assert.Equal(t, urgentWait, time.Since(begin))
			})
		}
		wg.Wait()
		time.Sleep(2 * time.Second) // nobody waits, and yet it lands
		assert.Equal(t, 2, up.asked())
		assert.Equal(t, "token-2", get(t, c))
	})
}

func TestATokenThatExpiresWhileItIsRefreshedIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(time.Hour - time.Second/2)
		up.slow(3 * time.Second)
		begin := time.Now()
		assert.Equal(t, "token-2", get(t, c))
		assert.Equal(t, 3*time.Second, time.Since(begin))
		assert.Equal(t, 2, up.asked())
	})
}

// inUse is a node on which all pods live but those named.
type inUse struct {
	mu   sync.Mutex // guards gone
	gone map[netip.Addr]bool
}

func (n *inUse) ask(caller netip.Addr, _ Key) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.gone[caller]
}

func (n *inUse) leave(caller netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone[caller] = true
}

func TestKeysInUseAreRefreshedWithoutTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: 50 * time.Millisecond}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		c := New(up.fetch, Config{InUse: node.ask})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		require.NoError(t, err)
		_, err = c.Get(t.Context(), key, bob)
		require.NoError(t, err)
		time.Sleep(25 * time.Hour)
		assert.Equal(t, 3, up.asked(), "twice a day")
		node.leave(alice)
		time.Sleep(24 * time.Hour)
		assert.Equal(t, 5, up.asked(), "bob is still there")
		node.leave(bob)
		time.Sleep(72 * time.Hour)
		assert.Equal(t, 5, up.asked(), "nobody is")
		assert.Zero(t, c.Stats().Entries, "and it is forgotten when it has expired")
	})
}

func TestARolloutOfManyPodsKeepsTheirKeyInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		c := New(up.fetch, Config{InUse: node.ask})
		defer c.Close()
		for i := range 30 {
			_, err := c.Get(t.Context(), key, pod(i))
			require.NoError(t, err)
			if i < 29 {
				node.leave(pod(i))
			}
		}
		time.Sleep(13 * time.Hour)
		assert.Equal(t, 2, up.asked(), "the last one is still there")
	})
}

// TestADayOfANode is 250 pods with a key each, who ask every ten minutes.
func TestADayOfANode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods = 250
		up := &fakeUpstream{turns: true, takes: 50 * time.Millisecond}
		c := New(up.fetch, Config{InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range pods {
			wg.Go(func() {
				for n := range 24 * 6 {
					asked := time.Now()
					_, err := c.Get(t.Context(), numbered(i), pod(i))
					assert.NoError(t, err)
					if n > 0 {
						assert.Zero(t, time.Since(asked), "a request after the first waits")
					}
					time.Sleep(10 * time.Minute)
				}
			})
		}
		wg.Wait()
		calls := make(map[string]int)
		perMinute := make(map[time.Duration]int)
		for _, call := range up.made() {
			calls[call.Resource]++
			if at := call.at.Sub(begin); at > time.Minute {
				perMinute[at.Truncate(time.Minute)]++
			}
		}
		assert.Len(t, calls, pods)
		for resource, n := range calls {
			assert.LessOrEqual(t, n, 3, "%s: the first, and 2 a day", resource)
		}
		for at, n := range perMinute {
			assert.Less(t, n, pods/10, "refreshes within the minute at %s", at)
		}
		assert.Equal(t, uint64(pods), c.Stats().Misses)
	})
}

// TestAnHourWithoutTheUpstream is 100 keys whose refreshes come due when it is down.
func TestAnHourWithoutTheUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 100
		up := &fakeUpstream{turns: true, takes: 10 * time.Millisecond}
		c := New(up.fetch, Config{InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		for i := range keys {
			_, err := c.Get(t.Context(), numbered(i), pod(i))
			require.NoError(t, err)
		}
		time.Sleep(10*time.Hour + 40*time.Minute) // the first is due at 10:48 at the earliest
		require.Equal(t, keys, up.asked())
		time.Sleep(80 * time.Minute) // the last at 12:00
		before := up.asked()
		require.Equal(t, 2*keys, before)

		time.Sleep(10*time.Hour + 30*time.Minute) // 22:30; the next are due from 21:36 on
		before = up.asked()
		up.fail(errors.New("down"))
		end := time.Now().Add(time.Hour)
		for time.Now().Before(end) {
			for i := range keys {
				asked := time.Now()
				token, err := c.Get(t.Context(), numbered(i), pod(i))
				require.NoError(t, err)
				require.True(t, token.ExpiresOn.After(asked))
				require.Zero(t, time.Since(asked), "nobody notices")
			}
			time.Sleep(time.Minute)
		}
		// Of one key in an hour: at 0, 0:30, 1:30, 3:30, 7:30, and then every 5 minutes.
		assert.LessOrEqual(t, up.asked()-before, keys*16)
		assert.LessOrEqual(t, up.mostInASecond(), DefaultPerSecond)
		up.fail(nil)
		time.Sleep(6 * time.Minute)
		assert.Zero(t, func() (stale int) {
			for _, e := range *c.byKey.Load() {
				if e.freshness(time.Now()) != fresh && e.failed > 0 {
					stale++
				}
			}
			return stale
		}(), "all are new within the longest pause")
	})
}

func TestTheRefresherLeavesRoomForCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: 6 * time.Minute}
		c := drawn(New(up.fetch, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		for i := range 20 {
			_, err := c.Get(t.Context(), numbered(i), pod(i))
			require.NoError(t, err)
			time.Sleep(time.Millisecond)
		}
		up.slow(9 * time.Second)
		time.Sleep(time.Minute)
		for i := 4; i < 10; i++ { // the refresher has begun with the first four
			go func() { _, _ = c.Get(t.Context(), numbered(i), pod(i)) }()
		}
		time.Sleep(time.Minute)
		assert.Equal(t, 40, up.asked())
		assert.Equal(t, maxRefreshes+6, up.peak)
	})
}

func TestARefreshNeverTakesThePlaceOfANewerToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
			if req.Fresh {
				time.Sleep(time.Second)
			} else if up.asked() > 0 {
				defer time.Sleep(3 * time.Second) // made early, late to arrive
			}
			return up.fetch(ctx, req)
		}, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(12 * time.Hour)
		get(t, c) // sends off the refresh
		token, err := c.Renew(t.Context(), key, alice, nil)
		require.NoError(t, err)
		renewed := token.AccessToken
		time.Sleep(time.Minute)
		assert.Equal(t, 3, up.asked())
		assert.Equal(t, renewed, get(t, c))
	})
}

func TestEvictedKeysAreNotRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{Size: 1, InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		for i := range 3 {
			_, err := c.Get(t.Context(), numbered(i), alice)
			require.NoError(t, err)
		}
		time.Sleep(13 * time.Hour)
		assert.Equal(t, 4, up.asked(), "the last one's alone")
		assert.Equal(t, fmt.Sprintf("r%d", 2), up.made()[3].Resource)
	})
}
