package tokencache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Between the caller's look at the cache and the start of its flight another may land,
// well or badly. The flight looks again, and asks only if it has to.
func TestAFlightLooksAgain(t *testing.T) {
	const s = time.Second
	for name, tc := range map[string]struct {
		landed  flight
		life    time.Duration // of what it brought; 0 for a failure
		renewal bool          // is what looks again, else it refreshes
		miss    bool          // it began when there was nothing
		after   time.Duration // it looks
		asks    bool
	}{
		"a miss after a miss":                    {flight{}, time.Hour, false, true, 0, false},
		"a miss after one that has expired":      {flight{}, s, false, true, s, true},
		"a miss after a failure":                 {flight{}, 0, false, true, 0, false},
		"a miss after a failure of long ago":     {flight{}, 0, false, true, s, true},
		"a refresh after a refresh":              {flight{}, time.Hour, false, false, 0, false},
		"a refresh after a renewal":              {flight{renewal: true}, time.Hour, false, false, 0, false},
		"a refresh after a refresh that failed":  {flight{}, 0, false, false, 0, false},
		"a refresh after one that failed before": {flight{}, 0, false, false, pause, true},
		"a renewal after a renewal":              {flight{renewal: true}, time.Hour, true, false, 0, false},
		"a renewal after a refresh":              {flight{}, time.Hour, true, false, 0, true},
		"a renewal after a refresh that failed":  {flight{}, 0, true, false, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				up := &fakeUpstream{}
				c := drawn(New(up.fetch, Config{}), 0)
				defer c.Close()
				if !tc.miss {
					get(t, c)
					time.Sleep(pause) // before that it is not refreshed
				}
				f := flight{Key: key, renewal: tc.renewal}
				w := &want{ctx: c.ctx, starter: alice, seen: c.lookup(key), turns: c.managedTurns, ticket: new(ticket)}
				tc.landed.Key = key
				if tc.life == 0 {
					_ = c.fail(tc.landed, alice, classed{}, time.Now())
				} else {
					c.store(tc.landed, w.seen, alice, &Token{ExpiresOn: time.Now().Add(tc.life)}, time.Now())
				}
				time.Sleep(tc.after)
				before := up.asked()
				e, err := c.fly(f, w)
				assert.Equal(t, tc.asks, up.asked() > before)
				if tc.asks || tc.life > 0 {
					require.NoError(t, err)
					assert.NotSame(t, w.seen, e)
				} else {
					assert.Error(t, err)
				}
			})
		})
	}
}
