package tokencache

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache/limiter"
)

func TestUpstreamLimits(t *testing.T) {
	for _, takes := range []time.Duration{0, 10 * time.Millisecond, 300 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			up := &fakeUpstream{imds: slots(), takes: takes}
			c := New(up.fetch, Config{})
			defer c.Close()
			var wg sync.WaitGroup
			for i := range 200 {
				wg.Go(func() {
					_, err := c.Get(t.Context(), numbered(i), pod(i))
					assert.NoError(t, err)
				})
			}
			wg.Wait()
			assert.Equal(t, 200, up.asked())
			up.keptItsLimits(t)
		})
	}
}

// A thousand keys of a hundred pods want 50 seconds of the upstream. Another pod comes
// with one, be it a key that somebody else has asked for last of ten.
func TestPodWithOneKeyWaitsForOneRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), takes: 50 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				begin := time.Now()
				_, err := c.Get(t.Context(), numbered(i), pod(i%100))
				if err == nil {
					return
				}
				var failure *Failure
				if assert.ErrorAs(t, err, &failure) {
					assert.Equal(t, Throttled, failure.Class, "it is the pod's own doing")
					assert.ErrorIs(t, err, ErrBusy)
					assert.GreaterOrEqual(t, failure.RetryAfter, time.Second)
				}
				assert.Equal(t, maxWait, time.Since(begin))
			})
			if i%100 == 99 {
				synctest.Wait() // so that numbers are in the order of time
			}
		}
		for _, wanted := range []Key{numbered(5000), numbered(999)} {
			begin := time.Now()
			_, err := c.Get(t.Context(), wanted, alice)
			require.NoError(t, err)
			assert.LessOrEqual(t, time.Since(begin), 100*time.Second/perSecond+time.Second, "%s", wanted.Resource)
		}
		assert.Equal(t, uint64(1), c.Stats().Joined)
		wg.Wait()
		up.keptItsLimits(t)
		assertIdle(t, c)
	})
}

func TestRetryAfterAppliesToAllCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), err: classed{Throttled, 7 * time.Second}}
		c := New(up.fetch, Config{})
		defer c.Close()
		begin := time.Now()
		_, err := c.Get(t.Context(), key, alice)
		require.Error(t, err)
		up.fail(nil)
		_, err = c.Get(t.Context(), numbered(1), bob)
		require.NoError(t, err)
		assert.Equal(t, 7*time.Second, time.Since(begin))
	})
}

func TestThrottledLongerThanMaxWaitFailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), err: classed{Throttled, time.Minute}}
		c := New(up.fetch, Config{})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		require.Error(t, err)
		time.Sleep(10 * time.Second)
		begin := time.Now()
		_, err = c.Get(t.Context(), numbered(1), bob)
		var failure *Failure
		require.ErrorAs(t, err, &failure)
		assert.Equal(t, Throttled, failure.Class)
		assert.Equal(t, 50*time.Second, failure.RetryAfter)
		assert.Zero(t, time.Since(begin))
		assert.Equal(t, 1, up.asked())
	})
}

// Callers come and go at random; each gets an answer.
func TestLimitsUnderStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), takes: 30 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 2000 {
			wg.Go(func() {
				time.Sleep(time.Duration(i*7919%60_000) * time.Millisecond)
				patience, cancel := context.WithTimeout(t.Context(), time.Duration(i*104729%3000)*time.Millisecond)
				defer cancel()
				_, err := c.Get(patience, numbered(i%700), pod(i%23))
				var failure *Failure
				assert.True(t, err == nil || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &failure), "%v", err)
			})
		}
		wg.Wait()
		time.Sleep(maxWait)
		synctest.Wait()
		up.keptItsLimits(t)
		assertIdle(t, c)
		assert.Zero(t, up.imds.Backlog())
	})
}

func TestServicePrincipalsHaveTheirOwnLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: limiter.New(perSecond, atOnce), takes: time.Hour}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range 10 {
			k := numbered(i)
			k.Principal = unique.Make(Principal{TenantID: "t"})
			wg.Go(func() { _, _ = c.Get(t.Context(), k, pod(i)) })
		}
		synctest.Wait()
		assert.Equal(t, atOnce, up.asked(), "they have a limit too")
		up.slow(0)
		begin := time.Now()
		get(t, c)
		assert.Zero(t, time.Since(begin), "what hangs there delays no other")
	})
}
