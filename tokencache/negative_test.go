package tokencache

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFailureRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: classed{class: Refused}}
		c := New(up.fetch, Config{})
		defer c.Close()
		for _, passed := range []time.Duration{0, 4 * time.Second} {
			time.Sleep(passed)
			_, err := c.Get(t.Context(), key, alice)
			var failure *Failure
			require.ErrorAs(t, err, &failure)
			assert.Equal(t, Refused, failure.Class)
			assert.Equal(t, refusedFor-passed, failure.RetryAfter)
			require.ErrorIs(t, err, classed{class: Refused}, "the upstream's own words")
		}
		assert.Equal(t, 1, up.asked())
		s := c.Stats()
		assert.Equal(t, Stats{Misses: 2, NegativeHits: 1, Fetches: [3]uint64{Miss: 1}, Failures: [3]uint64{Refused: 1}, Failing: 1}, s)
	})
}

func TestNegativeCacheIsBounded(t *testing.T) {
	up := &fakeUpstream{err: classed{class: Refused}}
	c := New(up.fetch, Config{})
	defer c.Close()
	for i := range 2 * maxFailures {
		_, err := c.Get(t.Context(), numbered(i), pod(i/callerBurst))
		require.Error(t, err)
	}
	assert.Equal(t, maxFailures, c.Stats().Failing)
	assert.Zero(t, c.Stats().Entries)
}

func TestOldFailuresDoNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: classed{class: Refused}}
		c := New(up.fetch, Config{})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		require.Error(t, err)
		time.Sleep(refusedFor + failureReset - 1)
		assert.Equal(t, 1, c.Stats().Failing)
		time.Sleep(time.Nanosecond)
		assert.Zero(t, c.Stats().Failing)
	})
}

// A panic of the cache's own would end the process.
func TestUnknownClassIsUnavailable(t *testing.T) {
	up := &fakeUpstream{err: classed{class: Throttled + 1}}
	c := New(up.fetch, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), key, alice)
	var failure *Failure
	require.ErrorAs(t, err, &failure)
	assert.Equal(t, Unavailable, failure.Class)
}

func TestSuccessClearsTheNegativeCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: errors.New("down"), life: time.Minute}
		c := New(up.fetch, Config{})
		defer c.Close()
		for range 3 {
			_, err := c.Get(t.Context(), key, alice)
			require.Error(t, err)
			time.Sleep(4 * time.Second)
		}
		up.fail(nil)
		get(t, c)
		assert.Zero(t, c.Stats().Failing)
		time.Sleep(time.Minute)
		up.fail(errors.New("down"))
		_, err := c.Get(t.Context(), key, alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, backoff, failure.RetryAfter, "counted from one")
	})
}

func TestRetryAfterOutlastsTheToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(56 * time.Minute)
		up.fail(classed{Throttled, 10 * time.Minute})
		assert.Equal(t, "token-1", get(t, c))
		time.Sleep(5 * time.Minute)
		_, err := c.Get(t.Context(), key, alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, Throttled, failure.Class)
		assert.Equal(t, 5*time.Minute, failure.RetryAfter)
		assert.Equal(t, 2, up.asked())
	})
}

func TestCallersShareAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: errors.New("down"), takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		for i := range 100 {
			go func() {
				_, err := c.Get(t.Context(), key, pod(i))
				assert.Error(t, err)
			}()
		}
		time.Sleep(time.Second + backoff - 1)
		synctest.Wait()
		assert.Equal(t, 1, up.asked())
	})
}
