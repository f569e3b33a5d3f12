package tokencache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// model is a Cache as the requirements tell of it: one thing after another, and none
// of it fast.
type model struct {
	size     int
	jitter   float64
	tokens   map[Key]*modelToken
	failures map[Key]modelFailure
	gone     map[netip.Addr]bool
	upstream struct {
		err             error
		life, refreshIn time.Duration
	}
	stats Stats
}

type modelToken struct {
	text                                           string
	expires, refresh, askAfter, renewedAt, touched time.Time

	failed int
	asked  bool // given to somebody when it was due
	users  map[netip.Addr]bool
}

type modelFailure struct {
	class Class
	until time.Time
	count int
}

// fetch asks the upstream. What is in memory changes accordingly.
func (m *model) fetch(key Key, now time.Time, renewal bool) error {
	old := m.tokens[key]
	switch {
	case renewal:
		m.stats.Fetches[Renewal]++
	case old != nil:
		m.stats.Fetches[Refresh]++
	default:
		m.stats.Fetches[Miss]++
	}
	if err := m.upstream.err; err != nil {
		m.failed(key, old, now, renewal)
		return err
	}
	life := m.upstream.life
	part := func(whole time.Duration) time.Duration { return time.Duration(m.jitter * float64(whole)) }
	token := &modelToken{
		text: fmt.Sprintf("token-%d", fetches(m.stats)), users: make(map[netip.Addr]bool),
		expires: now.Add(life), askAfter: now.Add(30 * time.Second), touched: now,
	}
	switch {
	case m.upstream.refreshIn != 0:
		token.refresh = now.Add(m.upstream.refreshIn + part(life/20))
	case life > 2*time.Hour:
		token.refresh = now.Add(life/2 - part(life/20))
	default:
		token.refresh = token.expires.Add(-5*time.Minute - part(5*time.Minute))
	}
	if old != nil {
		token.users, token.renewedAt = old.users, old.renewedAt
	} else if len(m.tokens) == m.size {
		delete(m.tokens, m.leastRecent()[0])
		m.stats.Evictions++
	}
	if renewal {
		token.renewedAt = now
	}
	m.tokens[key] = token
	delete(m.failures, key)
	return nil
}

// failed remembers failures of keys without a token: refusals for 10 s, others for 1, 2,
// 4 … 30 s. Refreshes are tried again after 30 s, 1, 2, 4, 5 minutes, when the last five
// minutes begin, and every 30 s in them. All of that later if the upstream says so.
func (m *model) failed(key Key, old *modelToken, now time.Time, renewal bool) {
	class, wait := classOf(m.upstream.err)
	m.stats.Failures[class]++
	if old == nil || !now.Add(wait).Before(old.expires) {
		count := 1
		if last, ok := m.failures[key]; ok && now.Before(last.until.Add(time.Minute)) {
			count += last.count
		}
		delay := min(30*time.Second, time.Second<<min(count-1, 5))
		if class == Refused {
			delay = 10 * time.Second
		}
		m.failures[key] = modelFailure{class, now.Add(max(delay, wait)), count}
	}
	if old == nil {
		return
	}
	if !renewal {
		delay := min(5*time.Minute, 30*time.Second<<min(old.failed, 4))
		old.failed++
		if last := old.expires.Add(-5 * time.Minute); !now.Before(last) {
			delay = 30 * time.Second
		} else if now.Add(delay).After(last) {
			delay = last.Sub(now)
		}
		wait = max(delay, wait)
	}
	if old.askAfter.Before(now.Add(wait)) {
		old.askAfter = now.Add(wait)
	}
}

// use notes a caller.
func (m *model) use(token *modelToken, caller netip.Addr, now time.Time) {
	token.users[caller] = true
	token.touched = now
}

func (m *model) leastRecent() []Key {
	return slices.SortedFunc(maps.Keys(m.tokens), func(a, b Key) int {
		return m.tokens[a].touched.Compare(m.tokens[b].touched)
	})
}

// get returns the token's text, or the class of the failure.
func (m *model) get(key Key, caller netip.Addr, now time.Time) string {
	token := m.tokens[key]
	if token == nil {
		return m.miss(key, caller, now, false)
	}
	m.use(token, caller, now)
	if urgent := !now.Before(token.expires.Add(-5 * time.Minute)); !urgent {
		token.asked = token.asked || !now.Before(token.refresh)
	} else if !now.Before(token.askAfter) {
		_ = m.fetch(key, now, false)
		return m.tokens[key].text
	}
	return token.text
}

func (m *model) renew(key Key, caller netip.Addr, now time.Time) string {
	token := m.tokens[key]
	if token == nil {
		return m.miss(key, caller, now, true)
	}
	if now.Before(token.renewedAt.Add(5 * time.Second)) {
		return m.get(key, caller, now)
	}
	m.use(token, caller, now)
	token.renewedAt = now
	if err := m.fetch(key, now, true); err != nil {
		class, _ := classOf(err)
		return class.String()
	}
	return m.tokens[key].text
}

func (m *model) miss(key Key, caller netip.Addr, now time.Time, renewal bool) string {
	if failure, ok := m.failures[key]; ok && now.Before(failure.until) {
		return failure.class.String()
	}
	if m.fetch(key, now, renewal) != nil {
		return m.failures[key].class.String()
	}
	m.use(m.tokens[key], caller, now)
	return m.tokens[key].text
}

// pass lets everything happen that does so by itself until then, in order.
func (m *model) pass(now, until time.Time) {
	for {
		var key Key
		at := until.Add(1)
		for k, token := range m.tokens {
			ready := slices.MinFunc([]time.Time{token.refresh, token.expires.Add(-5 * time.Minute)}, time.Time.Compare)
			ready = slices.MaxFunc([]time.Time{ready, token.askAfter, now}, time.Time.Compare)
			if !m.wanted(token) || ready.After(token.expires) {
				ready = token.expires
			}
			if ready.Before(at) {
				key, at = k, ready
			}
		}
		if at.After(until) {
			return
		}
		now = at
		if !now.Before(m.tokens[key].expires) {
			delete(m.tokens, key)
			continue
		}
		_ = m.fetch(key, now, false)
	}
}

// due reports whether the first of several callers would have the token refreshed
// behind their backs, so that it is open which token the others get.
func (m *model) due(key Key, now time.Time) bool {
	token := m.tokens[key]
	return token != nil && !now.Before(token.refresh) && now.Before(token.expires.Add(-5*time.Minute))
}

func (m *model) wanted(token *modelToken) bool {
	maps.DeleteFunc(token.users, func(user netip.Addr, _ bool) bool { return m.gone[user] })
	return token.asked || len(token.users) > 0
}

// TestModel does to a Cache and to its model whatever comes to mind. A seed that fails
// is a test of its own: -run 'TestModel/seed=7$'.
func TestModel(t *testing.T) {
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { testModel(t, rand.New(rand.NewPCG(seed, 0))) })
		})
	}
}

func testModel(t *testing.T, draw *rand.Rand) {
	t.Helper()
	m := &model{
		size: 1 + draw.IntN(4), jitter: draw.Float64(),
		tokens: make(map[Key]*modelToken), failures: make(map[Key]modelFailure), gone: make(map[netip.Addr]bool),
	}
	m.upstream.life = 24 * time.Hour
	up, node := &fakeUpstream{}, &inUse{gone: make(map[netip.Addr]bool)}
	c := drawn(New(func(ctx context.Context, req Request) (*Token, error) {
		token, err := up.fetch(ctx, req)
		if err == nil && m.upstream.refreshIn != 0 {
			token.RefreshOn = time.Now().Add(m.upstream.refreshIn)
		}
		return token, err
	}, Config{Size: m.size, InUse: node.ask}), m.jitter)
	defer c.Close()
	pods := []netip.Addr{pod(0), pod(1), pod(2)}
	answer := func(token *Token, err error) string {
		if failure := (*Failure)(nil); errors.As(err, &failure) {
			return failure.Class.String()
		}
		require.NoError(t, err)
		return token.AccessToken
	}
	renewed := func(token *Token, _ Source, err error) string { return answer(token, err) }
	for step := range 120 {
		before := time.Now()
		time.Sleep(2*time.Second + time.Duration(math.Exp(draw.Float64()*math.Log(float64(13*time.Hour)))))
		synctest.Wait()
		now := time.Now()
		m.pass(before, now)

		key, i := numbered(draw.IntN(m.size+2)), draw.IntN(len(pods))
		at := fmt.Sprintf("step %d, %s after the last, %s for %s", step, now.Sub(before), key.Resource, pods[i])
		switch what := draw.IntN(20); what {
		case 0, 1, 2:
			require.Equal(t, m.renew(key, pods[i], now), renewed(c.Renew(t.Context(), key, pods[i], nil)), "renewed: %s", at)
		case 3:
			m.gone[pods[i]] = true
			node.leave(pods[i])
			pods[i] = pod(3 + step)
		case 4, 5, 6:
			throttled := classed{Throttled, time.Duration(draw.IntN(1200)) * time.Second}
			m.upstream.err = []error{nil, nil, nil, nil, errors.New("down"), classed{class: Refused}, throttled}[draw.IntN(7)]
			lives := []time.Duration{24 * time.Hour, 8 * time.Hour, time.Hour, 24 * time.Hour, 400 * time.Second, 90 * time.Second, 20 * time.Second}
			m.upstream.life = lives[min(draw.IntN(4)+4*(draw.IntN(10)/9), 6)]
			m.upstream.refreshIn = []time.Duration{0, 0, 0, m.upstream.life / 4, -time.Minute}[draw.IntN(5)]
			up.fail(m.upstream.err)
			up.life = m.upstream.life
		default:
			got := make([]string, 1)
			if !m.due(key, now) && m.upstream.refreshIn == 0 && m.upstream.life >= time.Hour {
				got = make([]string, 1+what%3)
			}
			var all sync.WaitGroup
			for n := range got {
				all.Go(func() { got[n] = answer(c.Get(t.Context(), key, pods[i])) })
			}
			all.Wait()
			require.Equal(t, slices.Repeat([]string{m.get(key, pods[i], now)}, len(got)), got, "%s", at)
		}
		synctest.Wait()
		m.pass(now, now)
		keys := []Key{}
		for _, e := range stored(c) {
			keys = append(keys, e.key)
		}
		require.EqualValues(t, fetches(m.stats), up.asked(), "calls: %s", at)
		require.Equal(t, append([]Key{}, m.leastRecent()...), keys, "least recently used first: %s", at)
		require.Equal(t, len(m.tokens), c.Stats().Entries, "%s", at)
	}
	s := c.Stats()
	s = Stats{Fetches: s.Fetches, Evictions: s.Evictions, Failures: s.Failures}
	assert.Equal(t, m.stats, s)
}
