package proxy

import (
	"net/netip"
	"time"
)

// Pods share the agent's CPU. Its goroutines are scheduled first come, first served, and
// while one can run the network is not polled (runtime/proc.go, findRunnable): a pod that
// keeps 64 connections busy would make each request of the others wait for 64 of its own.
// So while more than one address asks, each is held to a share. A single one may have all.
const (
	// sharedRate is how many requests a second all addresses that ask at present share:
	// about what one core answers.
	sharedRate = 16_000
	// leastRate is the share of an address, however many there are. That together they can
	// then ask for more than sharedRate is no harm: most pods ask once an hour.
	leastRate = 2_000
	// paceBurst is how many requests an address may make at once, within its share.
	paceBurst = 8
	// paceWindow is how long an address counts as one that asks.
	paceWindow = 100 * time.Millisecond
)

// pace decides when a request may be handled. Its callers hold a lock.
type pace struct {
	byAddr map[netip.Addr]*paced // those that have asked of late, connected or not
	began  time.Time             // of the window
	window int                   // its number; from 1
	active int                   // addresses that have asked in it
	before int                   // addresses that asked in the window before
}

// paced is what a pace remembers of an address.
type paced struct {
	window int       // the last one in which it asked
	next   time.Time // when its share allows a request
}

func newPace() pace { return pace{byAddr: make(map[netip.Addr]*paced)} }

// delay notes a request from an address, and returns how long that has to wait.
func (p *pace) delay(from netip.Addr, now time.Time) time.Duration {
	if now.Sub(p.began) >= paceWindow {
		p.turn(now)
	}
	c := p.byAddr[from]
	if c == nil {
		c = new(paced)
		p.byAddr[from] = c
	}
	if c.window != p.window {
		c.window = p.window
		p.active++
	}
	asking := max(p.active, p.before)
	if asking < 2 {
		c.next = now
		return 0
	}
	interval := time.Second / time.Duration(max(sharedRate/asking, leastRate))
	if earliest := now.Add(-paceBurst * interval); c.next.Before(earliest) {
		c.next = earliest
	}
	c.next = c.next.Add(interval)
	return max(0, c.next.Sub(now))
}

// turn begins a window, and forgets the addresses that say nothing about it.
func (p *pace) turn(now time.Time) {
	p.before = p.active
	if now.Sub(p.began) >= 2*paceWindow {
		p.before = 0
	}
	p.began, p.active = now, 0
	p.window++
	for addr, c := range p.byAddr {
		if c.window < p.window-1 && c.next.Before(now) {
			delete(p.byAddr, addr)
		}
	}
}
