package tokencache

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// throttledFor is how long a caller that is over its rate is to wait.
func throttledFor(t *testing.T, err error) time.Duration {
	t.Helper()
	var failure *Failure
	require.ErrorAs(t, err, &failure)
	var over *rateError
	require.ErrorAs(t, err, &over)
	assert.Equal(t, Throttled, failure.Class)
	return failure.RetryAfter
}

// flood asks for a new key every 10 ms for as long as that, and returns how many of them
// were fetched.
func flood(t *testing.T, c *Cache, name string, caller netip.Addr, lasts time.Duration) (fetched int) {
	t.Helper()
	before := fetches(c.Stats())
	for n := range int(lasts / (10 * time.Millisecond)) {
		_, _ = c.Get(t.Context(), numberedFor(name, n), caller)
		time.Sleep(10 * time.Millisecond)
	}
	return int(fetches(c.Stats()) - before)
}

func numberedFor(name string, i int) Key {
	return Key{ClientID: key.ClientID, Resource: fmt.Sprintf("%s-%d", name, i)}
}

func TestCallerRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		for i := range callerBurst {
			_, err := c.Get(t.Context(), numbered(i), alice)
			require.NoError(t, err, "a burst is allowed")
		}
		_, err := c.Get(t.Context(), numbered(callerBurst), alice)
		assert.Equal(t, time.Second, throttledFor(t, err))
		require.ErrorContains(t, err, "the pod asks for more than 5 new tokens a second")
		assert.Equal(t, uint64(1), c.Stats().Rejections)
		_, _, err = c.Renew(t.Context(), numbered(0), alice, nil)
		throttledFor(t, err)
		_, err = c.Get(t.Context(), numbered(0), alice)
		require.NoError(t, err, "a token in memory costs nothing")
		_, err = c.Get(t.Context(), numbered(callerBurst), bob)
		require.NoError(t, err, "other callers have their own")
		_, err = c.Get(t.Context(), numbered(callerBurst), alice)
		require.NoError(t, err, "what another caller brought costs nothing")
		time.Sleep(time.Minute)
		assert.InDelta(t, callerBurst+10*callerRate, flood(t, c, "more", alice, 10*time.Second), 1)
		for i := range 1000 {
			_, err := c.Get(t.Context(), numberedFor("node", i), netip.Addr{})
			require.NoError(t, err, "the node asks for many pods")
		}
	})
}

func TestJoiningAFetchIsNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		flood(t, c, "spent", alice, 5*time.Second)
		up.slow(time.Second)
		var both sync.WaitGroup
		both.Go(func() { _, err := c.Get(t.Context(), key, bob); assert.NoError(t, err) })
		synctest.Wait()
		both.Go(func() { _, err := c.Get(t.Context(), key, alice); assert.NoError(t, err) })
		both.Wait()
	})
}

func TestRepeatedRefusalsHalveTheCallersRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: classed{class: Refused}}
		c := New(up.fetch, Config{})
		defer c.Close()
		flood(t, c, "a", alice, 20*time.Second)
		assert.InDelta(t, 100*time.Second/(3200*time.Millisecond), flood(t, c, "b", alice, 100*time.Second), 1)
		_, err := c.Get(t.Context(), key, alice)
		assert.LessOrEqual(t, throttledFor(t, err), 3200*time.Millisecond)
		require.ErrorContains(t, err, "requests for new tokens were refused; it is limited to one every 3.2s")
		assert.InDelta(t, callerBurst+callerRate, flood(t, c, "a bob", bob, time.Second), callerRate, "for it alone")

		up.fail(nil)
		time.Sleep(3200 * time.Millisecond)
		get(t, c)
		assert.InDelta(t, 50, flood(t, c, "c", alice, 10*time.Second), 1, "one success forgives all")
	})
}

// Neither is a refusal: they are not the caller's doing.
func TestOutagesAndThrottlingKeepTheCallersRate(t *testing.T) {
	for _, err := range []error{classed{class: Unavailable}, classed{class: Throttled}} {
		synctest.Test(t, func(t *testing.T) {
			up := &fakeUpstream{err: err}
			c := New(up.fetch, Config{})
			defer c.Close()
			flood(t, c, "a", alice, 20*time.Second)
			assert.InDelta(t, 50, flood(t, c, "b", alice, 10*time.Second), 1)
		})
	}
}

// A pod that is configured wrongly has some keys that are refused, and one that is not.
func TestValidKeyBesideRefusedKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: classed{class: Refused}}
		c := New(up.fetch, Config{})
		defer c.Close()
		for range 600 { // ten minutes, each of three keys once a second
			for i := range 3 {
				_, err := c.Get(t.Context(), numbered(i), alice)
				require.ErrorIs(t, err, classed{class: Refused}, "its own fault is what it is told")
			}
			time.Sleep(time.Second)
		}
		up.fail(nil)
		begin := time.Now()
		get(t, c)
		assert.Zero(t, time.Since(begin))
	})
}

// A pod that makes up keys, and comes back when it is told to, has its good one as well.
func TestValidKeyBesideMadeUpKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: classed{class: Refused}}
		c := New(up.fetch, Config{})
		defer c.Close()
		flood(t, c, "made up", alice, time.Minute)
		up.fail(nil)
		for tries := 1; ; tries++ {
			_, err := c.Get(t.Context(), key, alice)
			if err == nil {
				break
			}
			require.Less(t, tries, 3)
			time.Sleep(throttledFor(t, err))
		}
	})
}

// Tokens in memory are refreshed however much their pod asks for.
func TestRefreshesAreNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), life: time.Hour}
		c := drawn(New(up.fetch, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		for i := range callerBurst {
			_, err := c.Get(t.Context(), numbered(i), alice)
			require.NoError(t, err)
		}
		time.Sleep(54 * time.Minute)
		up.fail(classed{class: Refused})
		flood(t, c, "made up", alice, 30*time.Second)
		up.fail(nil)
		before := up.asked()
		flood(t, c, "made up too", alice, 2*time.Minute)
		renewed := 0
		for _, call := range up.made()[before:] {
			for i := range callerBurst {
				if call.Key == numbered(i) {
					renewed++
				}
			}
		}
		assert.Equal(t, callerBurst, renewed)
	})
}

// An expiring token is refreshed for its caller alone.
func TestRefreshOfAnExpiringTokenIsNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(56 * time.Minute)
		up.fail(classed{class: Refused})
		flood(t, c, "made up", alice, 10*time.Second)
		up.fail(nil)
		first := up.asked()
		assert.Equal(t, fmt.Sprintf("token-%d", first+1), get(t, c))
	})
}

func TestQuotasAreBounded(t *testing.T) {
	up := &fakeUpstream{err: classed{class: Refused}}
	c := New(up.fetch, Config{})
	defer c.Close()
	for i := range 3 * maxQuotas {
		_, err := c.Get(t.Context(), numbered(i), pod(i))
		require.Error(t, err)
	}
	assert.Equal(t, maxQuotas, c.quotas.Len())
}
