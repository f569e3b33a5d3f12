package tokencache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeUpstream counts its calls and hands out numbered tokens.
type fakeUpstream struct {
	mu    sync.Mutex // guards all below
	calls int
	life  time.Duration // of the tokens it gives
	takes time.Duration // how long a call lasts
	err   error
}

func (u *fakeUpstream) fetch(ctx context.Context, key Request) (*Token, error) {
	u.mu.Lock()
	u.calls++
	n, life, takes, err := u.calls, u.life, u.takes, u.err
	u.mu.Unlock()
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &Token{
		AccessToken: fmt.Sprintf("token-%d", n),
		Resource:    key.Resource,
		NotBefore:   now,
		ExpiresOn:   now.Add(life),
	}, nil
}

func (u *fakeUpstream) asked() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.calls
}

func (u *fakeUpstream) fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.err = err
}

var key = Key{ClientID: "11111111-1111-1111-1111-111111111111", Resource: "https://vault.azure.net"}

func get(t *testing.T, c *Cache) string {
	t.Helper()
	token, err := c.Get(t.Context(), key)
	require.NoError(t, err)
	return token.AccessToken
}

func TestSecondCallerIsAnsweredFromMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: 24 * time.Hour, takes: 50 * time.Millisecond}
		c := New(up.fetch, Config{})
		defer c.Close()
		assert.Equal(t, "token-1", get(t, c))
		begin := time.Now()
		assert.Equal(t, "token-1", get(t, c))
		assert.Zero(t, time.Since(begin), "no waiting on a hit")
		assert.Equal(t, Stats{Hits: 1, Misses: 1, Fetches: 1, Entries: 1}, c.Stats())
	})
}

func TestManyCallersOfAColdKeyMakeOneCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour, takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		var wg sync.WaitGroup
		for range 10_000 {
			wg.Go(func() {
				token, err := c.Get(t.Context(), key)
				assert.NoError(t, err)
				assert.Equal(t, "token-1", token.AccessToken)
			})
		}
		wg.Wait()
		assert.Equal(t, 1, up.asked())
	})
}

func TestACallerThatLeavesFailsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour, takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		impatient, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { // the first caller, whose request started the flight
			_, err := c.Get(impatient, key)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		})
		synctest.Wait()
		wg.Go(func() {
			token, err := c.Get(t.Context(), key)
			assert.NoError(t, err)
			assert.Equal(t, "token-1", token.AccessToken)
		})
		wg.Wait()
		assert.Equal(t, 1, up.asked())
	})
}

func TestAFlightHasItsOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour, takes: time.Hour}
		c := New(up.fetch, Config{FetchTimeout: 3 * time.Second})
		defer c.Close()
		begin := time.Now()
		_, err := c.Get(t.Context(), key)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 3*time.Second, time.Since(begin))
	})
}

// TestTimeline follows one key through its life, with the exact number of
// upstream calls at each step.
func TestTimeline(t *testing.T) {
	down := errors.New("upstream is down")
	type step struct {
		at    time.Duration // since the first request
		down  bool          // is the upstream failing?
		want  string        // "" means an error
		calls int           // upstream calls so far, refreshes included
	}
	for name, tc := range map[string]struct {
		life  time.Duration
		steps []step
	}{
		"a day's token is refreshed half-way, behind the caller": {24 * time.Hour, []step{
			{0, false, "token-1", 1},
			{12*time.Hour - time.Second, false, "token-1", 1},
			{12 * time.Hour, false, "token-1", 2},
			{12*time.Hour + time.Second, false, "token-2", 2},
			{30 * time.Hour, false, "token-2", 3},
		}},
		"an hour's token is refreshed in its last five minutes": {time.Hour, []step{
			{0, false, "token-1", 1},
			{55*time.Minute - time.Second, false, "token-1", 1},
			{55 * time.Minute, false, "token-1", 2},
			{56 * time.Minute, false, "token-2", 2},
		}},
		"an expired token is never served": {time.Hour, []step{
			{0, false, "token-1", 1},
			{time.Hour, false, "token-2", 2},
			{2 * time.Hour, true, "", 3},
			{2*time.Hour + time.Second, false, "token-4", 4},
		}},
		"a refresh that fails keeps the old token, and pauses": {24 * time.Hour, []step{
			{0, false, "token-1", 1},
			{12 * time.Hour, true, "token-1", 2},
			{12*time.Hour + time.Second, true, "token-1", 2},
			{12*time.Hour + 29*time.Second, true, "token-1", 2},
			{12*time.Hour + 30*time.Second, true, "token-1", 3},
			{23 * time.Hour, false, "token-1", 4},
			{23*time.Hour + time.Second, false, "token-4", 4},
		}},
		"a token that comes close to its end does not make each request a call": {time.Minute, []step{
			{0, false, "token-1", 1},
			{29 * time.Second, false, "token-1", 1},
			{30 * time.Second, false, "token-1", 2},
			{31 * time.Second, false, "token-2", 2},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				up := &fakeUpstream{life: tc.life}
				c := New(up.fetch, Config{})
				defer c.Close()
				begin := time.Now()
				for _, s := range tc.steps {
					time.Sleep(s.at - time.Since(begin))
					up.fail(nil)
					if s.down {
						up.fail(down)
					}
					token, err := c.Get(t.Context(), key)
					synctest.Wait() // a refresh, if one was sent off, lands
					if s.want == "" {
						require.ErrorIs(t, err, down, "at %s", s.at)
					} else {
						require.NoError(t, err, "at %s", s.at)
						require.Equal(t, s.want, token.AccessToken, "at %s", s.at)
					}
					require.Equal(t, s.calls, up.asked(), "calls at %s", s.at)
				}
			})
		})
	}
}

func TestManyCallersOfADueTokenStartOneRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: 24 * time.Hour, takes: time.Second}
		c := New(up.fetch, Config{})
		defer c.Close()
		get(t, c)
		time.Sleep(13 * time.Hour)
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { assert.Equal(t, "token-1", get(t, c)) })
		}
		wg.Wait()
		time.Sleep(time.Minute)
		assert.Equal(t, 2, up.asked())
		assert.Equal(t, "token-2", get(t, c))
	})
}

func TestAPanicIsAnErrorOfThatFlight(t *testing.T) {
	c := New(func(context.Context, Request) (*Token, error) { panic("boom") }, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), key)
	require.ErrorContains(t, err, "boom")
	assert.Equal(t, uint64(1), c.Stats().Failures)
}

func TestATokenThatArrivesExpiredIsAnError(t *testing.T) {
	up := &fakeUpstream{life: -time.Second}
	c := New(up.fetch, Config{})
	defer c.Close()
	_, err := c.Get(t.Context(), key)
	require.ErrorContains(t, err, "clock")
	assert.Zero(t, c.Stats().Entries)
}

func TestTheLeastRecentlyUsedLeaves(t *testing.T) {
	up := &fakeUpstream{life: time.Hour}
	c := New(up.fetch, Config{Size: 2})
	defer c.Close()
	for _, resource := range []string{"a", "b", "a", "c", "a"} {
		_, err := c.Get(t.Context(), Key{Resource: resource})
		require.NoError(t, err)
	}
	assert.Equal(t, 3, up.asked(), "a, b and c once each: a was used when c came")
	_, err := c.Get(t.Context(), Key{Resource: "b"})
	require.NoError(t, err)
	assert.Equal(t, 4, up.asked(), "b had left")
}

func TestCloseEndsFlightsAndKeepsTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: time.Hour}
		c := New(up.fetch, Config{FetchTimeout: time.Hour})
		get(t, c)
		up.mu.Lock()
		up.takes = time.Hour
		up.mu.Unlock()
		other := Key{Resource: "other"}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Get(t.Context(), other)
			assert.ErrorIs(t, err, context.Canceled)
		})
		synctest.Wait()
		c.Close()
		wg.Wait()
		assert.Equal(t, "token-1", get(t, c))
		_, err := c.Get(t.Context(), other)
		assert.ErrorIs(t, err, ErrClosed)
	})
}

func TestAHitAllocatesNothing(t *testing.T) {
	up := &fakeUpstream{life: time.Hour}
	c := New(up.fetch, Config{})
	defer c.Close()
	get(t, c)
	ctx := t.Context()
	assert.Zero(t, testing.AllocsPerRun(1000, func() { _, _ = c.Get(ctx, key) }))
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

func BenchmarkHit(b *testing.B) {
	up := &fakeUpstream{life: time.Hour}
	c := New(up.fetch, Config{})
	defer c.Close()
	ctx := b.Context()
	_, _ = c.Get(ctx, key)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			_, _ = c.Get(ctx, key)
		}
	})
}
