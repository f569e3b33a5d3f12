package listener

import (
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	start  = time.Unix(1e9, 0)
	greedy = netip.MustParseAddr("10.0.0.1")
)

// core is a model of a core that handles requests in the order in which they come, as Go's
// scheduler does: it parses a head, asks the pace, and handles the rest at once or when the
// pause is over.
type core struct {
	pace         pace
	parse, serve time.Duration
	now          time.Time
	used         time.Duration // CPU time
	queue        []task        // that can run
	paused       []task
	handled      map[*share]int
	waits        map[*share][]time.Duration
}

type task struct {
	of     *share
	came   time.Time
	ready  time.Time // not before
	parsed bool
}

func newCore(parse, serve time.Duration) *core {
	return &core{
		parse: parse, serve: serve, now: start, pace: newPace(),
		handled: make(map[*share]int), waits: make(map[*share][]time.Duration),
	}
}

// run lets one caller keep so many connections busy, and another make a request now and
// then, for so long.
func (c *core) run(length time.Duration, busy *share, connections int, now *share, then time.Duration) {
	for range connections {
		c.queue = append(c.queue, task{of: busy, came: c.now})
	}
	next := c.now.Add(then)
	c.pace.cpus = func() int { return 1 }
	c.pace.cpuTime = func() time.Duration { return c.used }
	for end := c.now.Add(length); c.now.Before(end); {
		c.pace.turn(c.now)
		if !c.now.Before(next) {
			c.queue = append(c.queue, task{of: now, came: c.now})
			next = next.Add(then)
		}
		var still []task
		for _, t := range c.paused {
			if t.ready.After(c.now) {
				still = append(still, t)
			} else {
				c.queue = append(c.queue, t)
			}
		}
		if c.paused = still; len(c.queue) == 0 {
			c.now = c.now.Add(10 * time.Microsecond)
			continue
		}
		t := c.queue[0]
		c.queue = c.queue[1:]
		if !t.parsed {
			c.now, c.used, t.parsed = c.now.Add(c.parse), c.used+c.parse, true
			if delay := c.pace.delay(t.of, 1, c.now); delay > 0 {
				t.ready = c.now.Add(delay)
				c.paused = append(c.paused, t)
				continue
			}
		}
		c.now, c.used = c.now.Add(c.serve), c.used+c.serve
		c.handled[t.of]++
		c.waits[t.of] = append(c.waits[t.of], c.now.Sub(t.came))
		if t.of == busy {
			c.queue = append(c.queue, task{of: busy, came: c.now})
		}
	}
}

func TestFloodsCostOthersLittle(t *testing.T) {
	for name, tc := range map[string]struct {
		parse, serve time.Duration
		connections  int
		every        time.Duration
		least        int           // requests a second of the flood
		wait         time.Duration // of the other
	}{
		"a slow machine, beside a caller that asks often": {10 * time.Microsecond, 40 * time.Microsecond, 64, 2 * time.Millisecond, 3900, 500 * time.Microsecond},
		"a fast machine, beside a caller that asks often": {2 * time.Microsecond, 10 * time.Microsecond, 64, 2 * time.Millisecond, 11_000, 200 * time.Microsecond},
		"beside a caller that asks now and then":          {2 * time.Microsecond, 10 * time.Microsecond, 64, 300 * time.Millisecond, 45_000, time.Millisecond},
		"a caller that keeps few connections busy":        {2 * time.Microsecond, 10 * time.Microsecond, 4, 300 * time.Millisecond, 50_000, 100 * time.Microsecond},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCore(tc.parse, tc.serve)
			var flood, good share
			c.run(300*time.Millisecond, &flood, tc.connections, &good, tc.every) // until it has settled
			clear(c.handled)
			clear(c.waits)
			c.run(time.Second, &flood, 0, &good, tc.every)
			var all, longest time.Duration
			waits := c.waits[&good]
			require.NotEmpty(t, waits)
			for _, wait := range waits {
				all += wait
				longest = max(longest, wait)
			}
			assert.Less(t, all/time.Duration(len(waits)), tc.wait, "on average")
			assert.Less(t, longest, 3*tc.wait)
			assert.Greater(t, c.handled[&flood], tc.least)
		})
	}
}

// longest is the longest pause among so many requests at once.
func longest(p *pace, s *share, requests, cost int) (longest time.Duration) {
	for range requests {
		longest = max(longest, p.delay(s, cost, start))
	}
	return longest
}

// among returns a pace with so many callers that are active, on a CPU that serves 1/initialCost.
func among(callers int) *pace {
	p := newPace()
	p.cpus = func() int { return 1 }
	p.turn(start)
	p.before = callers
	return &p
}

func TestShares(t *testing.T) {
	serves := busyShare * float64(time.Second) / float64(initialCost)
	pause := func(requests, callers int) float64 { return float64(requests*callers) / serves * float64(time.Second) }
	assert.Zero(t, longest(among(1), new(share), 10_000, 1), "nobody else is active")
	assert.InEpsilon(t, pause(100, 10), longest(among(10), new(share), paceBurst+100, 1), 1e-3)
	assert.Zero(t, longest(among(10), new(share), paceBurst, 1), "within its share")
	assert.Equal(t, (64-paceBurst)*time.Second/minShare, longest(among(250), new(share), 64, 1), "a request on each connection")
	assert.InEpsilon(t, pause(connectionCost, 10), longest(among(10), new(share), paceBurst/connectionCost+1, connectionCost), 1e-3)
}

// A caller that was held back, or has not come for a while, is not alone because it is the first
// in a window.
func TestFirstInAWindowIsNotAlone(t *testing.T) {
	p, flood := among(1), new(share)
	now := start
	good := new(share)
	for range 5 {
		p.delay(good, 1, now)
		now = now.Add(paceWindow)
		p.turn(now)
		longest := time.Duration(0)
		for range paceBurst + 10 {
			longest = max(longest, p.delay(flood, 1, now))
		}
		assert.Positive(t, longest)
		now = now.Add(paceWindow)
		p.turn(now)
	}
}

// The cost of a request is measured.
func TestRate(t *testing.T) {
	for cost, want := range map[time.Duration]time.Duration{
		13 * time.Microsecond: 13 * time.Microsecond, 50 * time.Microsecond: 50 * time.Microsecond,
		time.Millisecond: largestCost, 0: leastCost,
	} {
		p, now, used := newPace(), start, time.Duration(0)
		p.cpus = func() int { return 2 }
		p.cpuTime = func() time.Duration { return used }
		p.turn(now)
		for range 50 {
			for range minMeasured {
				p.delay(new(share), 1, now)
				used += cost
			}
			now = now.Add(paceWindow)
			p.turn(now)
		}
		assert.InEpsilon(t, want, p.cost, 0.01)
		assert.InEpsilon(t, busyShare*2*float64(time.Second)/float64(want), p.rate, 0.01)
		now = now.Add(paceWindow)
		p.delay(new(share), minMeasured-1, now)
		used += time.Second
		p.turn(now)
		assert.InEpsilon(t, want, p.cost, 0.01, "too few to measure")
	}
}

func TestPausesAreBounded(t *testing.T) {
	p, s := among(250), new(share)
	assert.InDelta(t, maxPause, longest(p, s, 10_000, connectionCost), float64(maxPause)/10)
	shortest := maxPause
	for range 100 {
		shortest = min(shortest, p.delay(s, 1, start))
	}
	assert.InDelta(t, maxPause/2, shortest, float64(maxPause)/10, "they do not all end at once")
}

func TestCallersThatAskNoMoreAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(8, 8)
		known := func() int { return len(l.callers) }
		ask := func(from netip.Addr) {
			l.mu.Lock()
			defer l.mu.Unlock()
			c := l.callers[from]
			if c == nil {
				c = &caller{addr: from}
			}
			l.delayLocked(c, 1, time.Now())
			l.callers[from] = c
		}
		for i := range 1000 {
			ask(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}))
		}
		time.Sleep(paceWindow)
		ask(greedy)
		assert.Equal(t, 1001, known(), "in the window before they count as callers that ask")
		time.Sleep(paceWindow)
		ask(greedy)
		assert.Equal(t, 1, known())
	})
}

// A caller whose connections are held back gets no new ones, rather than each for the last.
// Goroutines of connections that are evicted all the same do not stay, and pile up.
func TestConnectionsThatAreHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(10, 8)
		l.delayLocked(&caller{addr: netip.MustParseAddr("10.0.0.9")}, 1, time.Now()) // another is active
		admit := func(from string) *Conn {
			server, client := net.Pipe()
			t.Cleanup(func() { _ = client.Close() })
			c, ok := l.admit(addressed{server, from}).(*Conn)
			if !ok {
				return nil
			}
			l.ConnContext(t.Context(), c)
			return c
		}
		var conns []*Conn
		for range 8 {
			conns = append(conns, admit(greedy.String()))
		}
		const first = paceBurst / connectionCost // to be held back
		assert.Zero(t, conns[first-1].delay)
		assert.Positive(t, conns[first].delay)
		for range first { // those that are not held back are idle
			require.NotNil(t, admit(greedy.String()))
		}
		assert.Nil(t, admit(greedy.String()))

		began := time.Now()
		var reading sync.WaitGroup
		reading.Go(func() { _, _ = conns[first].Read(make([]byte, 1)) })
		synctest.Wait()
		for i := range 3 {
			require.NotNil(t, admit("10.0.0."+strconv.Itoa(i+2)))
		}
		reading.Wait()
		assert.Zero(t, time.Since(began), "the first of the caller with the most is evicted")
	})
}

func TestRequestsAreHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimiter(8, 8)
		l.pace.cpus = func() int { return 1 }
		l.delayLocked(&caller{addr: netip.MustParseAddr("10.0.0.9")}, 1, time.Now()) // another is active
		server, client := net.Pipe()
		defer client.Close()
		c, ok := l.admit(addressed{server, greedy.String()}).(*Conn)
		require.True(t, ok)
		const each = 2 * float64(initialCost) / busyShare // for one of two callers
		began := time.Now()
		for range (paceBurst-connectionCost)/serverCost + 10 {
			l.ConnState(c, http.StateActive)
			l.ConnState(c, http.StateIdle)
		}
		assert.InDelta(t, 10*serverCost*each, time.Since(began), float64(time.Microsecond))

		c.head.size = 5 << 10
		began = time.Now()
		l.ConnState(c, http.StateActive)
		assert.InDelta(t, 6*serverCost*each, time.Since(began), float64(time.Microsecond), "a large head counts for several")
	})
}

func TestPipelinedRequestsArePaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		defer client.Close()
		l := NewLimiter(8, 8)
		c, ok := l.admit(addressed{server, greedy.String()}).(*Conn)
		require.True(t, ok)
		go func() { _, _ = client.Write([]byte("GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")) }()
		began := time.Now()
		for range 2 {
			_, err := c.Read(make([]byte, 1024))
			require.NoError(t, err)
			l.ConnState(c, http.StateActive)
			l.ConnState(c, http.StateIdle)
		}
		assert.Equal(t, pipelinedPause, time.Since(began), "after the first, which has another behind it")
	})
}
