package limiter

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestTimeoutCountsFromTheLastCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(1, 1)
		held := acquire(t, l, of(pod(0)))
		begin := time.Now()
		alices := of(alice)
		go func() {
			time.Sleep(patience - time.Second)
			alices.join(bob)
		}()
		_, err := l.Acquire(t.Context(), begin, alices.waiting)
		require.ErrorIs(t, err, ErrTimeout)
		assert.Equal(t, 2*patience-time.Second, time.Since(begin))
		held(0)
		time.Sleep(time.Second)
		idle(t, l)
	})
}

// A retry whose callers have waited long enough takes a slot that is free.
func TestFreeSlotAfterTheTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(100, 100)
		r := of(alice)
		time.Sleep(patience)
		for range 50 {
			acquire(t, l, r)(0)
		}
	})
}

func TestCancelledRequestTakesNoSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(1, 1)
		held := acquire(t, l, of(alice))
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := l.Acquire(impatient, time.Now(), of(alice, bob).waiting)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		begin := time.Now()
		held(0)
		acquire(t, l, of(bob))(0)
		assert.Equal(t, time.Second, time.Since(begin))
		idle(t, l)
	})
}

func TestCancellationRacesWithASlot(t *testing.T) {
	l := New(1000, 1000)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		if release, err := l.Acquire(gone, time.Now(), of(alice).waiting); err == nil {
			release(0)
		}
	}
	idle(t, l)
}
