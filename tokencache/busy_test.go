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

	"github.com/podidentity/nmi/tokencache/limiter"
)

func TestTooManyFetchesFailAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range maxCalls {
			wg.Go(func() { _, _ = c.Get(t.Context(), numbered(i), alice) })
		}
		synctest.Wait()
		begin := time.Now()
		_, err := c.Get(t.Context(), numbered(maxCalls), alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, Throttled, failure.Class)
		assert.Zero(t, time.Since(begin))
		assert.Equal(t, uint64(1), c.Stats().Rejections)
		_, err = c.Get(t.Context(), numbered(0), alice)
		require.NoError(t, err, "what is on its way costs nothing")
		_, err = c.Get(t.Context(), numbered(maxCalls), bob)
		require.NoError(t, err, "never for others")
	})
}

// It asks on behalf of all pods that start.
func TestNodeIsNotLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 2 * maxCalls {
			wg.Go(func() {
				_, err := c.Get(t.Context(), numbered(i), netip.Addr{})
				assert.NoError(t, err)
			})
		}
		wg.Wait()
	})
}

func TestHangingUpstreamIsNotThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: time.Hour}
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
				assert.LessOrEqual(t, time.Since(begin), maxWait+fetchTimeout)
			})
		}
		wg.Wait()
	})
}

// maxWait is for the slot. Once a fetch has it, its callers wait for the answer.
func TestWaitingEndsWithTheSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: limiter.New(perSecond, 1), takes: fetchTimeout - 1}
		c := New(up.fetch, Config{})
		defer c.Close()
		go func() { _, _ = c.Get(t.Context(), numbered(1), bob) }()
		synctest.Wait()
		begin := time.Now()
		get(t, c)
		assert.Greater(t, time.Since(begin), maxWait)
	})
}

// A caller that has joined a fetch is not kept waiting by others that join it later.
func TestPatienceEndsThoughOthersJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: limiter.New(1, 1), takes: fetchTimeout - 1}
		c := New(up.fetch, Config{})
		var wg sync.WaitGroup
		defer wg.Wait()
		defer c.Close()
		for i := range 3 * 6 { // of each caller, older fetches
			wg.Go(func() { _, _ = c.Get(t.Context(), numbered(i), pod(i%6)) })
		}
		synctest.Wait()
		for i := range 6 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 5 * time.Second)
				_, _ = c.Get(t.Context(), key, pod(i))
			})
		}
		synctest.Wait()
		begin := time.Now()
		_, err := c.Get(t.Context(), key, pod(0))
		require.ErrorIs(t, err, ErrBusy)
		assert.Equal(t, maxPatience, time.Since(begin))
	})
}

// Neither many requests for one token are too much, nor the one in whose place it is
// refreshed in its last second.
func TestCallerWithOneKeyIsNotThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), life: time.Hour}
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

func TestRetryAfterTooManyFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		for i := range maxCalls {
			go func() { _, _ = c.Get(t.Context(), numbered(i), alice) }()
		}
		synctest.Wait()
		_, err := c.Get(t.Context(), numbered(maxCalls), alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, maxCalls*time.Second/callerRate, failure.RetryAfter, "what its fetches take at its rate")
	})
}

// That the upstream was not asked says nothing of the key.
func TestBusyIsNotCachedAsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: fmt.Errorf("%w: %w", ErrBusy, classed{Unavailable, 12 * time.Second})}
		c := New(up.fetch, Config{})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, Failure{Class: Unavailable, RetryAfter: 12 * time.Second, Err: ErrBusy}, *failure)
		assert.Equal(t, Stats{Misses: 1, Rejections: 1, Fetches: [3]uint64{Miss: 1}}, c.Stats())
		up.fail(nil)
		get(t, c)
	})
}
