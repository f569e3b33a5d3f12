package tokencache

import (
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAPodThatAsksTooMuchIsToldSoAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range maxFlights {
			wg.Go(func() { _, _ = c.Get(t.Context(), numbered(i), alice) })
		}
		synctest.Wait()
		begin := time.Now()
		_, err := c.Get(t.Context(), numbered(maxFlights), alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, Throttled, failure.Class)
		assert.Zero(t, time.Since(begin))
		assert.Equal(t, uint64(1), c.Stats().TurnedAway)
		_, err = c.Get(t.Context(), numbered(0), alice)
		require.NoError(t, err, "what is on its way costs nothing")
		_, err = c.Get(t.Context(), numbered(maxFlights), bob)
		require.NoError(t, err, "never for others")
	})
}

// It asks on behalf of all pods that start.
func TestTheNodeMayAskForManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 2 * maxFlights {
			wg.Go(func() {
				_, err := c.Get(t.Context(), numbered(i), netip.Addr{})
				assert.NoError(t, err)
			})
		}
		wg.Wait()
	})
}

func TestNobodyIsBlamedForAnUpstreamThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: time.Hour}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				begin := time.Now()
				_, err := c.Get(t.Context(), numbered(i), pod(i))
				var failure *Failure
				if assert.ErrorAs(t, err, &failure) {
					assert.Equal(t, Unavailable, failure.Class)
				}
				assert.LessOrEqual(t, time.Since(begin), maxWait+DefaultFetchTimeout)
			})
		}
		wg.Wait()
	})
}

// Patience is for the turn. Whose turn has come waits for the answer.
func TestWhoHasHadATurnIsNotTurnedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: maxWait - time.Second}
		c := New(up.fetch, Config{AtOnce: 1, FetchTimeout: maxWait})
		defer c.Close()
		go func() { _, _ = c.Get(t.Context(), numbered(1), bob) }()
		synctest.Wait()
		begin := time.Now()
		get(t, c)
		assert.Greater(t, time.Since(begin), maxWait)
	})
}

// Neither many requests for one token are too much, nor the one in whose place it is
// refreshed in its last second.
func TestWhoWantsOneTokenIsNotBlamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, life: time.Hour}
		c := drawn(New(up.fetch, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(time.Hour - time.Second/2)
		up.slow(time.Hour)
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range 50 {
			wg.Go(func() { _, _ = c.Get(t.Context(), numbered(i), pod(i)) })
		}
		synctest.Wait()
		for _, wanted := range []Key{key, numbered(100), numbered(100), numbered(100)} {
			caller := alice
			if wanted != key {
				caller = bob
			}
			wg.Go(func() {
				_, err := c.Get(t.Context(), wanted, caller)
				var failure *Failure
				if assert.ErrorAs(t, err, &failure) {
					assert.Equal(t, Unavailable, failure.Class, "%s", caller)
				}
			})
		}
	})
}

// Who is turned away is told to come back when the lines have ended.
func TestTheBacklogIsWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: time.Second}
		c := New(up.fetch, Config{PerSecond: 2, AtOnce: 1})
		defer c.Close()
		for i := range maxFlights {
			go func() { _, _ = c.Get(t.Context(), numbered(i), alice) }()
		}
		synctest.Wait()
		_, err := c.Get(t.Context(), numbered(maxFlights), alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, (maxFlights-1)*time.Second/2, failure.RetryAfter)
	})
}
