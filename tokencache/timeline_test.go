package tokencache

import (
	"errors"
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
		want  string        // "" means an error; "-" that there is no request
		calls int           // upstream calls so far, refreshes included
	}
	const h, m, s = time.Hour, time.Minute, time.Second
	for name, tc := range map[string]struct {
		life  time.Duration
		steps []step
	}{
		"a day's token is refreshed half-way, in the background": {24 * h, []step{
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
		"expiring, and the upstream down: the old token until it expires": {24 * h, []step{
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
		"a temporary failure for 1, 2, 4 … 30 s": {h, []step{
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

func TestManyCallersStartOneRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: time.Second}
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
		assert.Equal(t, Stats{Fresh: 1, Due: 1000, Misses: 1, Fetches: [3]uint64{Miss: 1, Refresh: 1}, Entries: 1}, c.Stats())
	})
}

func TestExpiringTokenIsServedIfItsRefreshIsSlow(t *testing.T) {
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
				assert.Equal(t, refreshWait, time.Since(begin))
			})
		}
		wg.Wait()
		c.mu.Lock()
		assert.Zero(t, c.calls[callID{Key: key}].waiting)
		c.mu.Unlock()
		time.Sleep(2 * time.Second) // the refresh goes on without callers
		synctest.Wait()
		assert.Equal(t, 2, up.asked())
		assert.Equal(t, "token-2", get(t, c))
		assert.Equal(t, Stats{Fresh: 1, Expiring: 100, Misses: 1, Joined: 100, Fetches: [3]uint64{Miss: 1, Refresh: 1}, Entries: 1}, c.Stats())
	})
}

func TestTokenExpiresDuringItsRefresh(t *testing.T) {
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

func TestTokenExpiresDuringAFailingRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(time.Hour - time.Second/2)
		up.slow(3 * time.Second)
		up.fail(errors.New("down"))
		token, err := c.Get(t.Context(), key, alice)
		require.ErrorContains(t, err, "down")
		assert.Nil(t, token)
	})
}
