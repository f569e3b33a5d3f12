package tokencache

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestTheUpstreamsLimitsAreKept(t *testing.T) {
	for _, takes := range []time.Duration{0, 10 * time.Millisecond, 300 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			up := &fakeUpstream{turns: true, takes: takes}
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
// with one.
func TestAPodThatWantsOneKeyWaitsARoundAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: 50 * time.Millisecond}
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
		}
		synctest.Wait()
		for _, wanted := range []func() Key{func() Key { return numbered(5000) }, func() Key { return lastInLine(c, pod(99)) }} {
			begin, wanted := time.Now(), wanted()
			_, err := c.Get(t.Context(), wanted, alice)
			require.NoError(t, err)
			assert.LessOrEqual(t, time.Since(begin), 100*time.Second/DefaultPerSecond+time.Second, "%s", wanted.Resource)
		}
		wg.Wait()
		up.keptItsLimits(t)
		assert.Empty(t, c.wants)
		assert.Empty(t, c.started)
	})
}

// lastInLine is the key that a caller asked for last of those it waits for.
func lastInLine(c *Cache, caller netip.Addr) (last Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.managedTurns.mu.Lock()
	defer c.managedTurns.mu.Unlock()
	line := c.managedTurns.lines[caller]
	for f, w := range c.wants {
		if w.ticket == line[len(line)-1] {
			last = f.Key
		}
	}
	return last
}

func TestAThrottleIsHonouredForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, err: classed{Throttled, 7 * time.Second}}
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

func TestAThrottleThatOutlastsAllPatienceIsToldAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, err: classed{Throttled, time.Minute}}
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

func TestTurnsThatNobodyWaitsForAreNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns(1, 1)
		defer turns.stop()
		first := new(ticket)
		turns.wanted(first, alice)
		require.NoError(t, turns.wait(t.Context(), first))

		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		second, third := new(ticket), new(ticket)
		turns.wanted(second, alice)
		turns.wanted(second, bob)
		turns.wanted(third, bob)
		require.ErrorIs(t, turns.wait(impatient, second), context.DeadlineExceeded)
		var wg sync.WaitGroup
		begin := time.Now()
		wg.Go(func() {
			assert.NoError(t, turns.wait(t.Context(), third))
			assert.Equal(t, time.Second, time.Since(begin))
			turns.done(0)
		})
		synctest.Wait()
		turns.done(0)
		wg.Wait()
		assert.Zero(t, turns.out)
		assert.Len(t, turns.slots, 1)
	})
}

// A flight that tries again has waited once already.
func TestWhoTriesAgainComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns(10, 1)
		defer turns.stop()
		older, newer := new(ticket), new(ticket)
		turns.wanted(older, alice)
		turns.wanted(newer, alice)
		require.NoError(t, turns.wait(t.Context(), older))
		var order []*ticket
		for _, k := range []*ticket{newer, older} {
			go func() {
				if assert.NoError(t, turns.wait(t.Context(), k)) {
					order = append(order, k)
					turns.done(0)
				}
			}()
			synctest.Wait()
		}
		turns.done(0)
		synctest.Wait()
		assert.Equal(t, []*ticket{older, newer}, order)
	})
}

// A turn that comes as its caller leaves is nobody's.
func TestATurnOfWhoLeavesInThatMomentEnds(t *testing.T) {
	turns := newTurns(1000, 1000)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		k := new(ticket)
		turns.wanted(k, alice)
		if turns.wait(gone, k) == nil {
			turns.done(0)
		}
	}
	assert.Zero(t, turns.out)
}

func TestALaterThrottleShortensNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := newTurns(3, 3)
		defer turns.stop()
		tickets := []*ticket{{}, {}, {}}
		for i, k := range tickets {
			turns.wanted(k, pod(i))
		}
		require.NoError(t, turns.wait(t.Context(), tickets[0]))
		require.NoError(t, turns.wait(t.Context(), tickets[1]))
		turns.done(10 * time.Second)
		turns.done(time.Second)
		assert.Equal(t, 10*time.Second, turns.backlog())
		begin := time.Now()
		require.NoError(t, turns.wait(t.Context(), tickets[2]))
		assert.Equal(t, 10*time.Second, time.Since(begin))
	})
}

func TestATurnEndsWithItsFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true}
		c := New(func(ctx context.Context, req Request) (*Token, error) {
			if req.Key == key {
				_, _ = req.Turn(ctx)
				panic("boom")
			}
			done, err := req.Turn(ctx)
			if err == nil {
				done(0)
				done(0)
			}
			return up.fetch(ctx, req)
		}, Config{AtOnce: 1})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		require.ErrorContains(t, err, "boom")
		_, err = c.Get(t.Context(), numbered(1), bob)
		require.NoError(t, err, "whose turn it is then")
		assert.Zero(t, c.managedTurns.out)
		assert.Len(t, c.managedTurns.slots, DefaultPerSecond)
	})
}

// Tickets come and go at random; nobody is forgotten, nothing is taken twice.
func TestTurnsUnderStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: 30 * time.Millisecond}
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
		time.Sleep(2 * time.Second)
		synctest.Wait()
		up.keptItsLimits(t)
		assert.Zero(t, c.managedTurns.out)
		assert.Len(t, c.managedTurns.slots, DefaultPerSecond)
		assert.Empty(t, c.wants)
		assert.Empty(t, c.started)
		assert.Zero(t, c.managedTurns.backlog())
	})
}

func TestServicePrincipalsHaveTurnsOfTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{turns: true, takes: time.Hour}
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
		assert.Equal(t, DefaultAtOnce, up.asked(), "they have a limit too")
		up.slow(0)
		begin := time.Now()
		get(t, c)
		assert.Zero(t, time.Since(begin), "and what hangs there holds up nobody else")
	})
}
