package listener

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	start          = time.Unix(1e9, 0)
	greedy, modest = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
)

// pacer is a Limiter of which only the pace is of interest.
type pacer struct{ *Limiter }

func newPacer() *pacer { return &pacer{NewLimiter(1, 1)} }

func (p *pacer) delay(from netip.Addr, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.callers[from]
	if c == nil {
		c = &caller{addr: from}
		p.callers[from] = c
	}
	c.acquired++ // for it not to be forgotten in between
	defer func() { c.acquired-- }()
	return p.delayLocked(c, now)
}

// asks makes requests on so many connections, each as soon as the last has been handled
// (which takes no time here), for a second, and returns how many there were.
func asks(p *pacer, from netip.Addr, connections int, meanwhile func(time.Time)) int {
	ready := make([]time.Time, connections)
	requests := 0
	for now := start; now.Before(start.Add(time.Second)); now = now.Add(25 * time.Microsecond) {
		meanwhile(now)
		for i := range ready {
			if !ready[i].After(now) {
				ready[i] = now.Add(p.delay(from, now))
				requests++
				break // a core handles one at a time
			}
		}
	}
	return requests
}

func TestOnePodMayAskAsFastAsItCan(t *testing.T) {
	p := newPacer()
	requests := asks(p, greedy, 64, func(time.Time) {})
	assert.Equal(t, 40_000, requests, "as many as a core handles")
}

func TestPodsThatAskAtTheSameTimeShare(t *testing.T) {
	p := newPacer()
	next := start
	var waits []time.Duration
	requests := asks(p, greedy, 64, func(now time.Time) {
		if now.Before(next) {
			return
		}
		waits = append(waits, p.delay(modest, now))
		next = next.Add(2 * time.Millisecond)
	})
	assert.InDelta(t, sharedRate/2, requests, 200)
	require.Len(t, waits, 500)
	for _, wait := range waits {
		require.Zero(t, wait, "a pod that asks for less than its share waits for nothing")
	}
}

func TestNoWaitIsLong(t *testing.T) {
	const connections = 64 // of one caller
	p := newPacer()
	for i := range 250 {
		p.delay(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), start)
	}
	var longest time.Duration
	for range connections {
		longest = max(longest, p.delay(greedy, start))
	}
	assert.Equal(t, (connections-paceBurst)*time.Second/leastRate, longest, "for all of its connections at once")
}

func TestSharesEndWhenTheOthersAreQuiet(t *testing.T) {
	p, now := newPacer(), start
	many := func(now time.Time) (last time.Duration) {
		for range 100 {
			last = p.delay(greedy, now)
		}
		return last
	}
	p.delay(modest, now)
	assert.Positive(t, many(now))
	assert.Positive(t, many(now.Add(paceWindow)), "the other has asked just now")
	assert.Zero(t, many(now.Add(2*paceWindow)))
	p.delay(modest, now.Add(2*paceWindow))
	assert.Positive(t, many(now.Add(2*paceWindow)))
	assert.Zero(t, many(now.Add(4*paceWindow)), "and after a long silence")
}

func TestAddressesThatAskNoMoreAreForgotten(t *testing.T) {
	p := newPacer()
	for i := range 1000 {
		p.delay(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), start)
	}
	p.delay(greedy, start.Add(paceWindow))
	known := func() int { return len(p.callers) } // the map itself would be a long failure
	assert.Equal(t, 1000, known(), "they may have waited until now")
	p.delay(greedy, start.Add(2*paceWindow))
	assert.Equal(t, 1, known())
}
