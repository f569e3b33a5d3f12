package tokencache

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func renew(t *testing.T, c *Cache, replace func(*Token) bool) string {
	t.Helper()
	token, _, err := c.Renew(t.Context(), key, alice, replace)
	require.NoError(t, err)
	return token.AccessToken
}

func TestRenewPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 100 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		assert.Equal(t, "token-1", get(t, c))
		assert.Equal(t, "token-2", renew(t, c, nil))
		assert.True(t, up.made()[1].Fresh, "no cache on the way may answer")
		assert.False(t, up.made()[0].Fresh)
		assert.Equal(t, "token-2", renew(t, c, nil), "too soon: the current one")
		assert.Equal(t, "token-2", get(t, c), "the others get the new one")
		time.Sleep(renewPause - 1)
		assert.Equal(t, "token-2", renew(t, c, nil))
		time.Sleep(time.Nanosecond)
		assert.Equal(t, "token-3", renew(t, c, nil))
		assert.Equal(t, uint64(2), c.Stats().Fetches[Renewal])
	})
}

func TestRenewOnAMiss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		assert.Equal(t, "token-1", renew(t, c, nil))
		assert.True(t, up.made()[0].Fresh)
		assert.Equal(t, "token-1", renew(t, c, nil))
	})
}

func TestRenewReplacesOnlyTheNamedToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		is := func(text string) func(*Token) bool {
			return func(token *Token) bool { return token.AccessToken == text }
		}
		assert.Equal(t, "token-1", renew(t, c, is("another")))
		assert.Equal(t, "token-2", renew(t, c, is("token-1")))
		time.Sleep(time.Minute)
		assert.Equal(t, "token-2", renew(t, c, is("token-1")), "somebody has done that")
		assert.Equal(t, 2, up.asked())
	})
}

func TestConcurrentRenewalsShareOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { assert.Equal(t, "token-2", renew(t, c, nil)) })
		}
		wg.Wait()
		assert.Equal(t, 2, up.asked())
	})
}

func TestFailedRenewalKeepsTheToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		down := errors.New("down")
		up.fail(down)
		_, _, err := c.Renew(t.Context(), key, alice, nil)
		require.ErrorIs(t, err, down, "a caller that does not accept the token in memory is not given it")
		assert.Equal(t, "token-1", get(t, c))
		assert.Equal(t, "token-1", renew(t, c, nil), "too soon")
		assert.Equal(t, 2, up.asked())
		assert.Zero(t, c.Stats().Failing)
	})
}

func TestRenewPauseAfterFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 10 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		up.fail(errors.New("down"))
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				for time.Since(begin) < renewPause-time.Second {
					if _, _, err := c.Renew(t.Context(), key, pod(i), nil); err == nil {
						time.Sleep(10 * time.Millisecond)
					}
				}
			})
		}
		wg.Wait()
		assert.Equal(t, 2, up.asked())
	})
}

func TestRenewalOutlivesItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 100 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, _, err := c.Renew(impatient, key, bob, nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(time.Second)
		assert.Equal(t, "token-2", renew(t, c, nil))
		assert.Equal(t, 2, up.asked())
	})
}

func TestRejectedRenewalDoesNotBlockOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		up.slow(time.Second)
		for i := range maxCalls {
			go func() { _, _ = c.Get(t.Context(), numbered(i), bob) }()
		}
		synctest.Wait()
		_, _, err := c.Renew(t.Context(), key, bob, nil)
		require.ErrorIs(t, err, ErrBusy)
		assert.NotEqual(t, "token-1", renew(t, c, nil))
	})
}

func TestFailedRenewalsDoNotDelayRefreshes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
			if req.Fresh {
				return nil, errors.New("no")
			}
			return up.fetch(ctx, req)
		}, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		get(t, c)
		for range 13 * time.Hour / renewPause {
			_, _, _ = c.Renew(t.Context(), key, bob, nil)
			time.Sleep(renewPause)
		}
		assert.Equal(t, 2, up.asked())
	})
}

func TestFailedRenewalDoesNotShortenRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := drawn(New(up.fetch, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		get(t, c)
		up.fail(classed{Throttled, 20 * time.Minute})
		time.Sleep(12*time.Hour + time.Second)
		assert.Equal(t, 2, up.asked())
		up.fail(errors.New("down"))
		_, _, err := c.Renew(t.Context(), key, alice, nil)
		require.Error(t, err)
		time.Sleep(20*time.Minute - 2*time.Second)
		assert.Equal(t, 3, up.asked())
		time.Sleep(2 * time.Second)
		assert.Equal(t, 4, up.asked())
	})
}

func TestRefresherWakesAfterBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		var c *Cache
		var once sync.Once
		c = drawn(New(up.fetch, Config{InUse: func(netip.Addr, Key) bool {
			once.Do(func() { // between its look at the key and the refresh
				up.fail(classed{Throttled, time.Minute})
				_, _, err := c.Renew(t.Context(), key, alice, nil)
				assert.Error(t, err)
				up.fail(nil)
			})
			return true
		}}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(12*time.Hour + time.Minute + time.Second)
		assert.Equal(t, 3, up.asked())
	})
}

// The renewal that failed counts, although the token that it was about has been replaced.
func TestRefreshDoesNotResetTheRenewPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
			if req.Fresh && up.asked() == 1 {
				_, _ = up.fetch(ctx, req)
				return nil, errors.New("no")
			}
			return up.fetch(ctx, req)
		}, Config{}), 0)
		defer c.Close()
		get(t, c)
		time.Sleep(12 * time.Hour)
		_, _, err := c.Renew(t.Context(), key, alice, nil)
		require.Error(t, err)
		get(t, c) // sends off the refresh
		synctest.Wait()
		assert.Equal(t, "token-3", renew(t, c, nil))
		assert.Equal(t, 3, up.asked())
	})
}
