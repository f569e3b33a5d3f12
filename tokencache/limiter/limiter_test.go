package limiter

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const patience = 18 * time.Second

var (
	alice = netip.MustParseAddr("10.0.0.1")
	bob   = netip.MustParseAddr("10.0.0.2")
)

func pod(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }

// request is one that others may join.
type request struct {
	mu      sync.Mutex // guards all following fields
	callers []netip.Addr
	until   time.Time
}

func of(callers ...netip.Addr) *request {
	return &request{callers: callers, until: time.Now().Add(patience)}
}

func (r *request) waiting() ([]netip.Addr, time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.callers, r.until
}

func (r *request) join(caller netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.callers = append(r.callers, caller)
	r.until = time.Now().Add(patience)
}

// acquire fails the test if there is no slot.
func acquire(t *testing.T, l *Limiter, r *request) (release func(time.Duration)) {
	t.Helper()
	release, err := l.Acquire(t.Context(), time.Now(), r.waiting)
	require.NoError(t, err)
	return release
}

// idle asserts that all slots have been released.
func idle(t *testing.T, l *Limiter) {
	t.Helper()
	assert.Zero(t, l.inFlight)
	assert.Len(t, l.available, l.perSecond)
	assert.Empty(t, l.waiters)
	assert.Zero(t, l.Backlog())
}

func TestRateAndConcurrency(t *testing.T) {
	for _, latency := range []time.Duration{0, 10 * time.Millisecond, 300 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			l := New(18, 4)
			var (
				mu             sync.Mutex // guards all following fields
				begun          []time.Time
				inFlight, peak int
				all            sync.WaitGroup
			)
			for i := range 200 {
				all.Go(func() {
					release := acquire(t, l, of(pod(i)))
					mu.Lock()
					begun = append(begun, time.Now())
					inFlight++
					peak = max(peak, inFlight)
					mu.Unlock()
					if latency > 0 { // go.dev/issue/78156
						time.Sleep(latency)
					}
					mu.Lock()
					inFlight--
					mu.Unlock()
					release(0)
				})
			}
			all.Wait()
			assert.LessOrEqual(t, peak, 4)
			for i, first := range begun {
				if i+18 < len(begun) {
					assert.GreaterOrEqual(t, begun[i+18].Sub(first), time.Second, "19 requests within a second")
				}
			}
			idle(t, l)
		})
	}
}

// Two agents of a node share the limits while one takes over from the other, which has requests
// in flight and many that wait.
func TestSetLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, next := New(18, 4), New(18, 4)
		next.SetLimits(9, 2)
		var (
			mu    sync.Mutex // guards all following fields
			begun []time.Time
			all   sync.WaitGroup
		)
		ask := func(l *Limiter, n int) {
			for i := range n {
				all.Go(func() {
					release := acquire(t, l, of(pod(i)))
					mu.Lock()
					begun = append(begun, time.Now())
					mu.Unlock()
					time.Sleep(50 * time.Millisecond)
					release(0)
				})
			}
		}
		ask(old, 150)
		time.Sleep(2*time.Second + 20*time.Millisecond)
		old.SetLimits(9, 2)
		next.PauseUntil(time.Now().Add(time.Second))
		ask(next, 100)
		time.Sleep(5 * time.Second)
		old.mu.Lock()
		assert.Equal(t, 9, old.inFlight+len(old.available))
		assert.LessOrEqual(t, old.inFlight, 2)
		old.mu.Unlock()
		all.Wait()
		next.SetLimits(18, 4)
		ask(next, 60)
		all.Wait()
		for i, first := range begun {
			if i+18 < len(begun) {
				assert.GreaterOrEqual(t, begun[i+18].Sub(first), time.Second, "19 requests within a second, request %d", i)
			}
		}
		idle(t, next)
	})
}

// An agent that gives half of its slots away says when it has none of them in flight.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(18, 4)
		require.NoError(t, l.Settle(t.Context()), "at once")
		var all sync.WaitGroup
		for i := range 6 {
			all.Go(func() {
				release := acquire(t, l, of(pod(i)))
				time.Sleep(time.Duration(i+1) * time.Second)
				release(0)
			})
			synctest.Wait() // in this order
		}
		began := time.Now()
		l.SetLimits(9, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		require.ErrorIs(t, l.Settle(ctx), context.DeadlineExceeded)
		go func() { _ = l.Settle(t.Context()) }() // several may wait
		require.NoError(t, l.Settle(t.Context()))
		assert.Equal(t, 2*time.Second, time.Since(began), "when two of four are left")
		require.NoError(t, l.Settle(t.Context()), "and from then on")
		all.Wait()
		idle(t, l)
		hold := []func(time.Duration){acquire(t, l, of(alice)), acquire(t, l, of(bob))}
		l.SetLimits(4, 1)
		settled := make(chan error)
		go func() { settled <- l.Settle(t.Context()) }()
		synctest.Wait()
		l.SetLimits(18, 4)
		require.NoError(t, <-settled, "when they are its own again")
		for _, release := range hold {
			release(0)
		}
	})
}

// Wherever on the way the service notices a request, that is before its answer is in.
func TestSlotCountsForASecondAfterItsRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(1, 1)
		release := acquire(t, l, of(alice))
		time.Sleep(5 * time.Second)
		release(0)
		begin := time.Now()
		acquire(t, l, of(alice))(0)
		assert.Equal(t, time.Second, time.Since(begin))
	})
}

// A thousand requests of a hundred callers want 50 seconds of the service. A caller with
// one request of its own, and one that joins the last request of another, wait for a round.
func TestCallerWithOneRequestWaitsForOneRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(20, 4)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		defer all.Wait()
		defer cancel()
		requests := make([]*request, 1000)
		for i := range requests {
			requests[i] = of(pod(i % 100))
			all.Go(func() {
				if release, err := l.Acquire(ctx, time.Now(), requests[i].waiting); err == nil {
					time.Sleep(10 * time.Millisecond)
					release(0)
				}
			})
			synctest.Wait() // in this order
		}
		begin := time.Now()
		alices := of(alice)
		release := acquire(t, l, alices)
		assert.LessOrEqual(t, time.Since(begin), 6*time.Second)
		release(0)

		begin = time.Now()
		last := requests[999]
		last.join(bob)
		for served := false; !served && time.Since(begin) < patience; time.Sleep(10 * time.Millisecond) {
			l.mu.Lock()
			served = true
			for _, w := range l.waiters {
				callers, _ := w.waiting()
				served = served && len(callers) == 1
			}
			l.mu.Unlock()
		}
		assert.LessOrEqual(t, time.Since(begin), 6*time.Second)
	})
}

// One that always has another request may not go first each time.
func TestTurnsRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(100, 1)
		held := acquire(t, l, of(pod(9)))
		var order []netip.Addr
		var all sync.WaitGroup
		wait := func(caller netip.Addr) {
			all.Go(func() {
				release := acquire(t, l, of(caller))
				order = append(order, caller)
				release(0)
			})
			synctest.Wait()
		}
		for range 3 {
			wait(alice)
		}
		wait(bob)
		wait(bob)
		wait(pod(3))
		held(0)
		all.Wait()
		assert.Equal(t, []netip.Addr{alice, bob, pod(3), alice, bob, alice}, order)
		idle(t, l)
	})
}

func TestWithoutARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(0, 2)
		begin := time.Now()
		for range 1000 {
			one, two := acquire(t, l, of(alice)), acquire(t, l, of(alice))
			one(0)
			two(0)
		}
		assert.Zero(t, time.Since(begin))
		held, _ := acquire(t, l, of(alice)), acquire(t, l, of(alice))
		time.AfterFunc(time.Second, func() { held(0) })
		acquire(t, l, of(bob))(0)
		assert.Equal(t, time.Second, time.Since(begin), "one at a time is left")
	})
}

func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(2, 1)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for range 20 {
			go func() { _, _ = l.Acquire(ctx, time.Now(), of(alice).waiting) }()
		}
		synctest.Wait()
		assert.Equal(t, 19*time.Second/2, l.Backlog())
	})
}

// Requests come, are joined and are given up at random; each slot is released once.
func TestStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(18, 4)
		var all sync.WaitGroup
		for i := range 2000 {
			all.Go(func() {
				time.Sleep(time.Duration(i*7919%60_000) * time.Millisecond)
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i*104729%3000)*time.Millisecond)
				defer cancel()
				r := of(pod(i % 23))
				go r.join(pod(i % 7))
				if release, err := l.Acquire(ctx, time.Now(), r.waiting); err == nil {
					time.Sleep(time.Duration(i%60) * time.Millisecond)
					release(0)
				}
			})
		}
		all.Wait()
		time.Sleep(time.Second)
		idle(t, l)
	})
}

// BenchmarkDispatch is the worst that pods can do: 250 of them with 20 requests each.
func BenchmarkDispatch(b *testing.B) {
	l := New(18, 4)
	for i := range 5000 {
		r := of(pod(i % 250))
		l.waiters = append(l.waiters, &waiter{waiting: r.waiting})
	}
	b.ReportAllocs()
	for b.Loop() {
		l.mu.Lock()
		l.nextLocked()
		l.mu.Unlock()
	}
}

// TestRateFromStart: the rate of NewFromStart does not depend on how long requests take.
func TestRateFromStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewFromStart(2, 5)
		began := time.Now()
		var releases []func(time.Duration)
		for i := range 4 { // none of which ends
			releases = append(releases, acquire(t, l, of(alice)))
			assert.Equal(t, time.Duration(i/2)*time.Second, time.Since(began), "request %d", i)
		}
		l.SetLimits(1, 5)
		releases = append(releases, acquire(t, l, of(alice)))
		assert.Equal(t, 2*time.Second, time.Since(began))
		l.SetLimits(3, 5)
		waiting := time.AfterFunc(3*time.Second, func() { releases[0](0) })
		releases[0] = acquire(t, l, of(alice))
		assert.Equal(t, 5*time.Second, time.Since(began), "five at once")
		waiting.Stop()
		for _, release := range releases {
			release(0)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		idle(t, l)
	})
}
