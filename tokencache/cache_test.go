package tokencache

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unique"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache/limiter"
)

func TestHit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 50 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		assert.Equal(t, "token-1", get(t, c))
		begin := time.Now()
		assert.Equal(t, "token-1", get(t, c))
		assert.Zero(t, time.Since(begin), "no waiting on a hit")
		assert.Equal(t, Stats{Fresh: 1, Misses: 1, Fetches: [3]uint64{Miss: 1}, Entries: 1}, c.Stats())
	})
}

func TestManyCallersShareOneFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for i := range 10_000 {
			wg.Go(func() {
				token, err := c.Get(t.Context(), key, pod(i%250))
				assert.NoError(t, err)
				assert.Equal(t, "token-1", token.AccessToken)
			})
		}
		wg.Wait()
		assert.Equal(t, 1, up.asked())
		assert.Equal(t, uint64(9_999), c.Stats().Joined)
	})
}

func TestCancelledCallerDoesNotFailOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		impatient, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { // the first caller, whose request started the fetch
			_, err := c.Get(impatient, key, alice)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		})
		synctest.Wait()
		wg.Go(func() {
			token, err := c.Get(t.Context(), key, bob)
			assert.NoError(t, err)
			assert.Equal(t, "token-1", token.AccessToken)
		})
		wg.Wait()
		assert.Equal(t, 1, up.asked())
	})
}

// Its token is there when they come back.
func TestFetchOutlivesItsCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: 2 * time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.Get(impatient, key, alice)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(time.Second / 2)
		begin := time.Now()
		assert.Equal(t, "token-1", get(t, c))
		assert.Equal(t, time.Second/2, time.Since(begin), "it is joined")
		assert.Equal(t, "token-1", get(t, c))
		assertIdle(t, c)
	})
}

// Connections bound the fetches with callers, and this the others.
func TestFetchesWithoutCallersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{takes: fetchTimeout - 1}
		c := New(up.fetch, Config{})
		defer c.Close()
		gone, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for i := range maxUnattended + 50 {
			wg.Go(func() {
				_, err := c.Get(gone, numbered(i), pod(i%50))
				assert.ErrorIs(t, err, context.DeadlineExceeded)
			})
		}
		synctest.Wait()
		go func() { _, _ = c.Get(t.Context(), key, alice) }()
		wg.Wait()
		synctest.Wait()
		up.mu.Lock()
		assert.Equal(t, maxUnattended+1, up.out, "the others are cancelled")
		up.mu.Unlock()
		before := up.asked()
		for i := range maxUnattended + 50 {
			wg.Go(func() {
				_, err := c.Get(t.Context(), numbered(i), pod(i%50))
				assert.NoError(t, err)
			})
		}
		wg.Wait()
		assert.Equal(t, before+50, up.asked(), "those are fetched again")
		time.Sleep(fetchTimeout)
		synctest.Wait()
		assertIdle(t, c)
		assert.Zero(t, c.Stats().Failures, "which says nothing of the upstream")
		assert.Zero(t, c.Stats().Failing)
	})
}

// A caller that comes when a call has ended starts a new one, though singleflight has not
// delivered the result of the last.
func TestEndedCallIsNotJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{err: ErrBusy}
		c := New(up.fetch, Config{})
		defer c.Close()
		delivered := make(chan struct{})
		c.mu.Lock()
		cl, err := c.startLocked(callID{Key: key}, nil, c.quotaLocked(bob), time.Now())
		require.NoError(t, err)
		cl.callers, cl.waiting = []netip.Addr{bob}, 1
		c.group.DoChan(cl.id.String(), func() (any, error) {
			e, err := c.load(cl)
			<-delivered
			return e, err
		})
		c.mu.Unlock()
		synctest.Wait()
		up.fail(nil)
		begin := time.Now()
		assert.Equal(t, "token-2", get(t, c))
		assert.Zero(t, time.Since(begin))
		close(delivered)
		assertIdle(t, c)
	})
}

// assertIdle asserts that nothing is kept of calls that have ended.
func assertIdle(t *testing.T, c *Cache) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	assert.Empty(t, c.calls)
	for _, q := range c.quotas.Values() {
		assert.Zero(t, q.calls)
	}
}

func TestPanicInFetch(t *testing.T) {
	c := New(func(context.Context, Request) (*Token, error) { panic("boom") }, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), key, alice)
	require.ErrorContains(t, err, "boom")
	assert.Equal(t, [3]uint64{Unavailable: 1}, c.Stats().Failures)
}

func TestTokenExpiredOnArrival(t *testing.T) {
	up := &fakeUpstream{life: -time.Second}
	c := New(up.fetch, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), key, alice)
	require.ErrorContains(t, err, "clock")
	assert.Zero(t, c.Stats().Entries)
}

func TestLeastRecentlyUsedIsEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{Size: 2})
		defer c.Close()
		for _, resource := range []string{"a", "b", "a", "c", "a"} {
			_, err := c.Get(t.Context(), Key{Resource: resource}, alice)
			require.NoError(t, err)
		}
		assert.Equal(t, 3, up.asked(), "a, b and c once each: a was used when c came")
		_, err := c.Get(t.Context(), Key{Resource: "b"}, alice)
		require.NoError(t, err)
		assert.Equal(t, 4, up.asked(), "b was evicted")
		assert.Equal(t, uint64(2), c.Stats().Evictions)
		assert.Equal(t, 2, c.Stats().Entries)
	})
}

// A pod chooses its resources, and so could evict everybody else's tokens.
func TestCallerWithTooManyTokensEvictsItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{Size: 300})
		defer c.Close()
		get(t, c)
		for i := range 2 * maxOwned {
			time.Sleep(time.Second / callerRate)
			_, err := c.Get(t.Context(), numbered(i), bob)
			require.NoError(t, err)
		}
		assert.Equal(t, maxOwned+1, c.Stats().Entries)
		owned := make(map[netip.Addr]int)
		for _, e := range stored(c) {
			owned[e.owner]++
		}
		assert.Equal(t, map[netip.Addr]int{alice: 1, bob: maxOwned}, owned)
		assert.Equal(t, "token-1", get(t, c))
		_, err := c.Get(t.Context(), numbered(maxOwned), bob)
		require.NoError(t, err)
		assert.Equal(t, 2*maxOwned+1, up.asked(), "bob's oldest was evicted")
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		assert.Zero(t, c.Stats().Entries)
	})
}

func TestCloseCancelsFetchesAndKeepsTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{})
		get(t, c)
		up.slow(time.Hour)
		other := Key{Resource: "other"}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Get(t.Context(), other, alice)
			assert.ErrorIs(t, err, ErrClosed)
		})
		synctest.Wait()
		c.Close()
		wg.Wait()
		assert.Equal(t, "token-1", get(t, c))
		_, err := c.Get(t.Context(), other, alice)
		assert.ErrorIs(t, err, ErrClosed)
	})
}

// Whatever is under way: misses, refreshes of both kinds and renewals, with a slot or
// waiting for one.
func TestCloseLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: limiter.New(3, 3), entra: limiter.New(3, 3), life: time.Hour}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		c := drawn(New(up.fetch, Config{InUse: node.ask}), 0)
		of := func(i int) Key {
			k := numbered(i)
			if i%2 == 1 {
				k.Principal = unique.Make(Principal{TenantID: "t"})
			}
			return k
		}
		for i := range 10 {
			_, err := c.Get(t.Context(), of(i), pod(i))
			require.NoError(t, err)
		}
		up.slow(time.Hour)
		time.Sleep(55*time.Minute + time.Second)
		for i := range 40 {
			go func() { _, _ = c.Get(t.Context(), of(i), pod(i)) }()
			go func() { _, _, _ = c.Renew(t.Context(), of(i), pod(i%7), nil) }()
		}
		time.Sleep(time.Second / 2)
		c.Close()
		assert.Zero(t, up.out, "no fetch is under way")
		synctest.Wait() // singleflight's goroutines end, or the bubble fails
		assert.Zero(t, up.imds.Backlog()+up.entra.Backlog(), "no fetch waits")
		assertIdle(t, c)
	})
}

func TestKeyTooLong(t *testing.T) {
	up := &fakeUpstream{}
	c := New(up.fetch, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), Key{Resource: strings.Repeat("r", maxKey+1)}, alice)
	require.ErrorIs(t, err, ErrKeyTooLong)
	assert.Zero(t, up.asked())
	assert.Zero(t, c.Stats().Failing)
}

// A resource is part of a request line of some kilobytes.
func TestStoredKeysDoNotRetainTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := New(up.fetch, Config{})
		defer c.Close()
		line := "resource=" + strings.Repeat("r", 20) + strings.Repeat("x", 8<<10)
		wanted := Key{Resource: line[9:29]}
		own := func(kept Key) bool { return unsafe.StringData(kept.Resource) != unsafe.StringData(wanted.Resource) }
		_, err := c.Get(t.Context(), wanted, alice)
		require.NoError(t, err)
		assert.True(t, own(stored(c)[0].key))
		time.Sleep(time.Hour)
		up.fail(classed{class: Refused})
		_, err = c.Get(t.Context(), wanted, alice)
		require.Error(t, err)
		assert.True(t, own(c.failed.byKey.Keys()[0]))
	})
}

func TestServicePrincipalKeys(t *testing.T) {
	of := func(tenant string) Key {
		k := key
		k.Principal = unique.Make(Principal{TenantID: tenant, SecretName: "s"})
		return k
	}
	first, again := of("a"), of("a")
	assert.Equal(t, first, again)
	assert.NotEqual(t, of("a"), of("b"))
	assert.NotEqual(t, of("a").String(), of("b").String())
	_, ok := key.FromEntra()
	assert.False(t, ok)
	p, ok := of("a").FromEntra()
	assert.True(t, ok)
	assert.Equal(t, "a", p.TenantID)
}

func TestHitDoesNotAllocate(t *testing.T) {
	up := &fakeUpstream{}
	c := New(up.fetch, Config{})
	defer c.Close()
	get(t, c)
	ctx := t.Context()
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = c.Get(ctx, key, alice) }))
}

func FuzzKeyStringsAreUnique(f *testing.F) {
	f.Add("a", "b", "c", "a", "b", "c")
	f.Add("a\" \"b", "", "c", "a", "b\" \"", "c")
	f.Fuzz(func(t *testing.T, a1, a2, a3, b1, b2, b3 string) {
		a, b := Key{ClientID: a1, ResourceID: a2, Resource: a3}, Key{ClientID: b1, ResourceID: b2, Resource: b3}
		if (a == b) != (a.String() == b.String()) {
			t.Fatalf("%#v and %#v both read %s", a, b, a)
		}
	})
}

// BenchmarkHit is one pod's, then one pod's a core: with -cpu 1,2,… the second is to
// scale with the cores.
func BenchmarkHit(b *testing.B) {
	for name, pods := range map[string]int32{"pod": 1, "pods": 16} {
		b.Run(name, func(b *testing.B) {
			up := &fakeUpstream{}
			c := New(up.fetch, Config{})
			defer c.Close()
			ctx := b.Context()
			_, _ = c.Get(ctx, key, alice)
			var n atomic.Int32
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				caller := pod(int(n.Add(1) % pods))
				for pb.Next() {
					_, _ = c.Get(ctx, key, caller)
				}
			})
		})
	}
}
