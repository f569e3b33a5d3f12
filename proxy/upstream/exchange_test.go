package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

func TestWaitForASlotIsNotPartOfTheTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Latency: 4 * time.Second})
		u, stop := inMemory(t, imds)
		defer stop()
		slots := counted(u)
		slots.delay = 50 * time.Second
		_, err := u.Token(t.Context(), asking(key))
		require.NoError(t, err)
		slots.check(t, 1)
	})
}

func TestNoSlot(t *testing.T) {
	refused := errors.New("no")
	for name, tc := range map[string]struct {
		delay time.Duration // of the limiter
		err   error
		want  error
		takes time.Duration
	}{
		"ctx ends":            {time.Minute, nil, context.DeadlineExceeded, 10 * time.Second},
		"the limiter refuses": {0, refused, refused, 0},
		"no slot in time":     {0, limiter.ErrTimeout, tokencache.ErrBusy, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
				u, stop := inMemory(t, imds)
				defer stop()
				slots := counted(u)
				slots.delay, slots.err = tc.delay, tc.err
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				begin := time.Now()
				_, err := u.Token(ctx, asking(key))
				require.ErrorIs(t, err, tc.want)
				assert.Zero(t, imds.Requests())
				assert.Equal(t, tc.takes, time.Since(begin), "not tried again")
				assert.NoError(t, u.Unavailable(), "it says nothing of IMDS")
			})
		})
	}
}

func TestNoSlotForARetry(t *testing.T) {
	for _, refused := range []error{errors.New("no"), limiter.ErrTimeout, &limiter.PausedError{For: time.Hour}} {
		synctest.Test(t, func(t *testing.T) {
			imds := imdstest.NewServer(imdstest.Config{})
			imds.Inject(imdstest.Fault{Status: 404})
			u, stop := inMemory(t, imds)
			defer stop()
			slots := counted(u)
			slots.err, slots.after = refused, 1
			_, err := u.Token(t.Context(), asking(key))
			require.ErrorIs(t, err, refused)
			assert.ErrorContains(t, err, "404", "and the error of the try before")
			assert.NotErrorIs(t, err, tokencache.ErrBusy, "IMDS was asked")
			slots.check(t, 1)
		})
	}
}

// The deadline starts with the first slot, and stands still while a retry waits for its own.
func TestFetchTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		imds.Inject(always(imdstest.Fault{Hang: true})...)
		u, stop := inMemory(t, imds)
		defer stop()
		slots := counted(u)
		slots.delay = 8 * time.Second
		begin := time.Now()
		_, err := u.Token(t.Context(), asking(key))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "context deadline exceeded after 10s")
		assert.InDelta(t, 2*slots.delay+fetchTimeout, time.Since(begin), float64(time.Second))
		slots.check(t, 2)
		assert.Error(t, u.Unavailable())
	})
}

// The first slot begins the deadline anew, and the time of tries does not count as waiting.
func TestFetchSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		until := time.Now().Add(4 * time.Second)
		ctx, f := newFetch(t.Context(), limiter.New(1, 1), new(counts), tokencache.Request{Waiting: func() ([]netip.Addr, time.Time) {
			return []netip.Addr{podAddr(0)}, until
		}})
		defer f.end()
		time.Sleep(2 * time.Second) // as for reading a Secret
		release, err := f.slot(ctx)
		require.NoError(t, err)
		assert.Equal(t, fetchTimeout, time.Until(f.ends))
		time.Sleep(9 * time.Second)
		release(0)
		begin := time.Now()
		release, err = f.slot(ctx)
		require.NoError(t, err)
		assert.Equal(t, time.Second, time.Since(begin))
		assert.Equal(t, fetchTimeout-9*time.Second, time.Until(f.ends))
		release(0)
		time.Sleep(time.Second)
		synctest.Wait()
		assert.ErrorIs(t, context.Cause(ctx), errFetchTimeout)
	})
}

// IMDS's 429 keeps all pods from asking, and is what a handover carries.
func TestThrottlingPausesAllFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		imds.Inject(imdstest.Fault{Status: 429, RetryAfter: "7"})
		u, stop := inMemory(t, imds)
		defer stop()
		_, err := u.Token(t.Context(), asking(key))
		require.Error(t, err)
		assert.Equal(t, 7*time.Second, time.Until(u.PausedUntil()))
		u.PauseUntil(time.Now().Add(20 * time.Second))
		begin := time.Now()
		_, err = u.Token(t.Context(), asking(key))
		require.NoError(t, err)
		assert.Equal(t, 20*time.Second, time.Since(begin))
		u.PauseUntil(time.Now().Add(10 * time.Minute))
		_, err = u.Token(t.Context(), asking(key))
		assert.Equal(t, tokencache.Throttled, classOf(err))
		var patient interface{ Wait() time.Duration }
		require.ErrorAs(t, err, &patient)
		assert.Equal(t, 10*time.Minute, patient.Wait())
		assert.Equal(t, 2, imds.Requests())
	})
}

// net/http sends a GET again by itself if it was sent on a connection that turns out to
// be closed; IMDS would count two requests, the limiter one.
func TestRetriesTakeASlotEach(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	u := upstreamOf(t, imds.Start())
	slots := counted(u)
	for range 5 {
		_, err := u.Token(t.Context(), asking(key))
		require.NoError(t, err)
		imds.Inject(imdstest.Fault{Reset: true}) // on the connection that is kept
	}
	slots.check(t, imds.Requests())
	assert.Equal(t, 9, imds.Requests())
}

func TestConnectionRefused(t *testing.T) {
	u := New(Config{IMDS: &url.URL{Scheme: "http", Host: closedAddr}})
	defer u.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := u.Token(ctx, asking(key))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.ErrorContains(t, err, "connection refused", "the cause is not hidden by the deadline")
}

func TestFreshBypassesIMDSsOwnCache(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Cached: true})
	u := upstreamOf(t, imds.Start())
	ask := asking(key)
	var tokens []string
	for _, ask.Fresh = range []bool{false, false, true, false} {
		token, err := u.Token(t.Context(), ask)
		require.NoError(t, err)
		tokens = append(tokens, token.AccessToken)
	}
	assert.Equal(t, tokens[0], tokens[1])
	assert.NotEqual(t, tokens[1], tokens[2])
	assert.Equal(t, tokens[2], tokens[3])
	for i, call := range imds.Calls() {
		target, err := url.Parse(call.Target)
		require.NoError(t, err)
		assert.Equal(t, i == 2, target.Query().Get("bypass_cache") == "true")
	}
}

// A cold node with everything in it: IMDS counts what the limiter let through, each try.
func TestIMDSLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Latency: 100 * time.Millisecond})
		for range 20 {
			imds.Inject(imdstest.Fault{Status: 404}, imdstest.Fault{Cut: true}, imdstest.Fault{Reset: true}, imdstest.Fault{Slow: time.Second}, imdstest.Fault{})
		}
		u, stop := inMemory(t, imds)
		defer stop()
		cache := tokencache.New(u.Token, tokencache.Config{})
		defer cache.Close()
		var pods sync.WaitGroup
		for i := range 100 {
			pods.Go(func() {
				_, err := cache.Get(t.Context(), tokencache.Key{ClientID: known.ClientID, Resource: fmt.Sprint(i)}, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
				assert.NoError(t, err)
			})
		}
		pods.Wait()
		atOnce, perSecond := imds.Peak()
		assert.Equal(t, 160, imds.Requests())
		assert.LessOrEqual(t, atOnce, 4)
		assert.LessOrEqual(t, perSecond, 18)
	})
}
