package tokencache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// inUse is a node on which all pods live but those named.
type inUse struct {
	mu   sync.Mutex // guards gone
	gone map[netip.Addr]bool
}

func (n *inUse) ask(caller netip.Addr, _ Key) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.gone[caller]
}

func (n *inUse) leave(caller netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.gone[caller] = true
}

func TestTokensInUseAreRefreshedWithoutRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: 50 * time.Millisecond}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		c := New(up.fetch, Config{InUse: node.ask})
		defer c.Close()
		_, err := c.Get(t.Context(), key, alice)
		require.NoError(t, err)
		_, err = c.Get(t.Context(), key, bob)
		require.NoError(t, err)
		time.Sleep(25 * time.Hour)
		assert.Equal(t, 3, up.asked(), "twice a day")
		node.leave(alice)
		time.Sleep(24 * time.Hour)
		assert.Equal(t, 5, up.asked(), "bob is still there")
		node.leave(bob)
		time.Sleep(72 * time.Hour)
		assert.Equal(t, 5, up.asked(), "none is")
		assert.Zero(t, c.Stats().Entries, "and it is failureReset when it has expired")
	})
}

func TestRolloutKeepsATokenInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		node := &inUse{gone: make(map[netip.Addr]bool)}
		c := New(up.fetch, Config{InUse: node.ask})
		defer c.Close()
		for i := range 30 {
			_, err := c.Get(t.Context(), key, pod(i))
			require.NoError(t, err)
			if i < 29 {
				node.leave(pod(i))
			}
		}
		time.Sleep(13 * time.Hour)
		assert.Equal(t, 2, up.asked(), "the last one is still there")
	})
}

// TestOneDayOnANode is 250 pods with a key each, which ask every ten minutes.
func TestOneDayOnANode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods = 250
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: 50 * time.Millisecond}
		c := New(up.fetch, Config{InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		begin := time.Now()
		var wg sync.WaitGroup
		for i := range pods {
			wg.Go(func() {
				for n := range 24 * 6 {
					asked := time.Now()
					_, err := c.Get(t.Context(), numbered(i), pod(i))
					assert.NoError(t, err)
					if n > 0 {
						assert.Zero(t, time.Since(asked), "a request after the first waits")
					}
					time.Sleep(10 * time.Minute)
				}
			})
		}
		wg.Wait()
		calls := make(map[string]int)
		perMinute := make(map[time.Duration]int)
		for _, call := range up.made() {
			calls[call.Resource]++
			if at := call.at.Sub(begin); at > time.Minute {
				perMinute[at.Truncate(time.Minute)]++
			}
		}
		assert.Len(t, calls, pods)
		for resource, n := range calls {
			assert.LessOrEqual(t, n, 3, "%s: the first, and 2 a day", resource)
		}
		for at, n := range perMinute {
			assert.Less(t, n, pods/10, "refreshes within the minute at %s", at)
		}
		assert.Equal(t, uint64(pods), c.Stats().Misses)
	})
}

// TestUpstreamDownForAnHour is 100 keys whose refreshes come due when it is down.
func TestUpstreamDownForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 100
		up := &fakeUpstream{imds: slots(), entra: slots(), takes: 10 * time.Millisecond}
		c := New(up.fetch, Config{InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		for i := range keys {
			_, err := c.Get(t.Context(), numbered(i), pod(i))
			require.NoError(t, err)
		}
		time.Sleep(10*time.Hour + 40*time.Minute) // the first is due at 10:48 at the earliest
		require.Equal(t, keys, up.asked())
		time.Sleep(80 * time.Minute) // the last at 12:00
		before := up.asked()
		require.Equal(t, 2*keys, before)

		time.Sleep(10*time.Hour + 30*time.Minute) // 22:30; the next are due from 21:36 on
		before = up.asked()
		up.fail(errors.New("down"))
		end := time.Now().Add(time.Hour)
		for time.Now().Before(end) {
			for i := range keys {
				asked := time.Now()
				token, err := c.Get(t.Context(), numbered(i), pod(i))
				require.NoError(t, err)
				require.True(t, token.ExpiresOn.After(asked))
				require.Zero(t, time.Since(asked), "callers do not notice")
			}
			time.Sleep(time.Minute)
		}
		// Of one key in an hour: at 0, 0:30, 1:30, 3:30, 7:30, and then every 5 minutes.
		assert.LessOrEqual(t, up.asked()-before, keys*16)
		assert.LessOrEqual(t, up.mostInASecond(), perSecond)
		up.fail(nil)
		time.Sleep(6 * time.Minute)
		assert.Zero(t, func() (stale int) {
			for _, e := range stored(c) {
				if e.freshness(time.Now()) != fresh && e.failures > 0 {
					stale++
				}
			}
			return stale
		}(), "all are new within the longest pause")
	})
}

func TestRefresherLeavesSlotsForCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{life: 6 * time.Minute}
		c := drawn(New(up.fetch, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		for i := range 20 {
			_, err := c.Get(t.Context(), numbered(i), pod(i))
			require.NoError(t, err)
			time.Sleep(time.Millisecond)
		}
		up.slow(9 * time.Second)
		time.Sleep(time.Minute)
		for i := 4; i < 10; i++ { // the refresher has begun with the first four
			go func() { _, _ = c.Get(t.Context(), numbered(i), pod(i)) }()
		}
		time.Sleep(time.Minute)
		assert.Equal(t, 40, up.asked())
		assert.Equal(t, maxRefreshes+6, up.peak)
		last := up.made()[38:]
		assert.ElementsMatch(t, []string{"r18", "r19"}, []string{last[0].Resource, last[1].Resource}, "the first to expire come first")
	})
}

func TestHangingEntraDoesNotDelayIMDSRefreshes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		entra, imds := &fakeUpstream{life: 6 * time.Minute}, &fakeUpstream{life: 6 * time.Minute}
		c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
			if _, ok := req.FromEntra(); ok {
				return entra.fetch(ctx, req)
			}
			return imds.fetch(ctx, req)
		}, Config{InUse: (&inUse{}).ask}), 0)
		defer c.Close()
		for i := range 2 * maxRefreshes {
			k := numbered(i)
			k.Principal = unique.Make(Principal{TenantID: "t"})
			_, err := c.Get(t.Context(), k, pod(i))
			require.NoError(t, err)
		}
		time.Sleep(time.Second)
		get(t, c)
		entra.slow(time.Hour)
		time.Sleep(time.Minute)
		synctest.Wait()
		assert.Equal(t, 3*maxRefreshes, entra.asked())
		assert.Equal(t, 2, imds.asked())
	})
}

// A caller of Renew is given the token of the renewal, whichever of the two fetches ends first.
func TestRefreshDoesNotReplaceARenewal(t *testing.T) {
	const s = time.Second
	for _, takes := range []struct{ refresh, renewal time.Duration }{{3 * s, s}, {s, 3 * s}} {
		synctest.Test(t, func(t *testing.T) {
			up := &fakeUpstream{}
			var fresh string
			c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
				token, err := up.fetch(ctx, req) // made early, late to arrive
				if req.Fresh {
					fresh = token.AccessToken
					time.Sleep(takes.renewal)
				} else if up.asked() > 1 {
					time.Sleep(takes.refresh)
				}
				return token, err
			}, Config{}), 0)
			defer c.Close()
			get(t, c)
			time.Sleep(12 * time.Hour)
			get(t, c) // sends off the refresh
			token, _, err := c.Renew(t.Context(), key, alice, nil)
			require.NoError(t, err)
			assert.Equal(t, fresh, token.AccessToken)
			time.Sleep(time.Minute)
			assert.Equal(t, 3, up.asked())
			assert.Equal(t, fresh, get(t, c))
		})
	}
}

func TestEvictedKeysAreNotRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &fakeUpstream{}
		c := New(up.fetch, Config{Size: 1, InUse: func(netip.Addr, Key) bool { return true }})
		defer c.Close()
		for i := range 3 {
			_, err := c.Get(t.Context(), numbered(i), alice)
			require.NoError(t, err)
		}
		time.Sleep(13 * time.Hour)
		assert.Equal(t, 4, up.asked(), "the last one's alone")
		assert.Equal(t, fmt.Sprintf("r%d", 2), up.made()[3].Resource)
	})
}
