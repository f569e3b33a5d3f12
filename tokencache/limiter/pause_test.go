package limiter

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRetryKeepsItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(10, 1)
		since := time.Now()
		time.Sleep(time.Second)
		held := acquire(t, l, of(bob))
		var order []string
		var all sync.WaitGroup
		for _, r := range []struct {
			name  string
			since time.Time
		}{{"first", time.Now()}, {"second", time.Now()}, {"retry", since}} {
			all.Go(func() {
				release, err := l.Acquire(t.Context(), r.since, of(alice).waiting)
				assert.NoError(t, err)
				order = append(order, r.name)
				release(0)
			})
			synctest.Wait()
		}
		held(0)
		all.Wait()
		assert.Equal(t, []string{"retry", "first", "second"}, order)
	})
}

func TestRetryAfterAppliesToAllCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(18, 4)
		begin := time.Now()
		release := acquire(t, l, of(alice))
		other := acquire(t, l, of(alice))
		release(7 * time.Second)
		other(time.Second) // shortens nothing
		assert.Equal(t, 7*time.Second, l.Backlog())
		assert.Equal(t, begin.Add(7*time.Second), l.PausedUntil())
		acquire(t, l, of(bob))(0)
		assert.Equal(t, 7*time.Second, time.Since(begin))
	})
}

func TestPauseLongerThanAnybodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(18, 4)
		acquire(t, l, of(alice))(time.Minute)
		time.Sleep(10 * time.Second)
		begin := time.Now()
		_, err := l.Acquire(t.Context(), begin, of(bob).waiting)
		var paused *PausedError
		require.ErrorAs(t, err, &paused)
		assert.Equal(t, 50*time.Second, paused.For)
		assert.Zero(t, time.Since(begin))
		idle := l.inFlight == 0 && len(l.waiters) == 0
		assert.True(t, idle)
	})
}

func TestPauseUntil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, next := New(18, 4), New(18, 4)
		assert.Zero(t, first.PausedUntil())
		acquire(t, first, of(alice))(7 * time.Second)
		next.PauseUntil(first.PausedUntil().Round(0)) // as on the wire
		next.PauseUntil(time.Time{})
		begin := time.Now()
		acquire(t, next, of(bob))(0)
		assert.Equal(t, 7*time.Second, time.Since(begin))
		next.PauseUntil(time.Now().Add(100 * time.Hour))
		next.PauseUntil(time.Now().Add(time.Minute))
		assert.Equal(t, time.Hour, time.Until(next.PausedUntil()))
	})
}
