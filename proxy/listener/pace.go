package listener

import (
	"math/rand/v2"
	"time"
)

// Callers share the agent's CPU. Goroutines run in the order in which they became runnable,
// and the network is not polled while one is (runtime/proc.go, findRunnable): with a caller
// that keeps 64 connections busy, each request of others would wait for 64 requests. So while
// more than one caller is active, each is held to a share. One that is alone has about what a
// core serves, lest a request that another sends now and then finds a long queue.
const (
	// sharedRate is how many requests a second the active callers share; aloneRate is for a
	// single one.
	sharedRate, aloneRate = 10_000, 40_000
	// minShare is the least share of a caller, in requests a second. With many callers the
	// sum exceeds sharedRate, which does no harm: most pods send a request an hour.
	minShare = 250
	// paceBurst is how many requests of a caller may come at once, within its share, and
	// aloneBurst of one that is alone: one on each connection, since pauses cost CPU time, too.
	paceBurst, aloneBurst = 16, 64
	// connectionCost is what a new connection counts, in requests. Each KiB of a head counts
	// one.
	connectionCost = 8
	// maxPause bounds how long a request is held back. A caller with longer pauses than that
	// makes less than a request a second for each of its connections.
	maxPause = 2 * time.Second
	// pipelinedPause precedes a request that was sent before the last response was read.
	// Its goroutine would stay runnable otherwise. No SDK pipelines.
	pipelinedPause = 10 * time.Millisecond
	// paceWindow is how long a caller counts as active after a request.
	paceWindow = 100 * time.Millisecond
)

// pace decides when a request may be handled. Limiter.mu guards it.
type pace struct {
	began  time.Time // of the window
	window int       // its number; from 1
	active int       // callers with a request in it
	before int       // callers with one in the window before
}

// share is what a pace keeps of a caller.
type share struct {
	window int       // the last one with a request
	next   time.Time // when it is allowed a request
}

// turn begins a new window if it is time, and reports whether it was.
func (p *pace) turn(now time.Time) bool {
	elapsed := now.Sub(p.began)
	if elapsed < paceWindow {
		return false
	}
	p.before = p.active
	if elapsed >= 2*paceWindow {
		p.before = 0
	}
	p.began, p.active = now, 0
	p.window++
	return true
}

// delay notes what a caller does, which counts as cost requests, and returns how long that
// must wait.
func (p *pace) delay(s *share, cost int, now time.Time) time.Duration {
	if s.window != p.window {
		s.window = p.window
		p.active++
	}
	rate, burst := aloneRate, aloneBurst
	if active := max(p.active, p.before); active > 1 {
		rate, burst = max(sharedRate/active, minShare), paceBurst
	}
	interval := time.Second / time.Duration(rate)
	if earliest := now.Add(-time.Duration(burst) * interval); s.next.Before(earliest) {
		s.next = earliest
	}
	s.next = s.next.Add(time.Duration(cost) * interval)
	if latest := now.Add(maxPause); s.next.After(latest) {
		s.next = latest
		return maxPause/2 + rand.N(maxPause/2) // lest all that wait for so long come at once
	}
	return max(0, s.next.Sub(now))
}

// forgets reports whether a share no longer differs from a new one.
func (p *pace) forgets(s *share, now time.Time) bool {
	return s.window == 0 || s.window < p.window-1 && s.next.Before(now)
}

// delayLocked is pace.delay for a caller.
func (l *Limiter) delayLocked(c *caller, cost int) time.Duration {
	now := time.Now()
	if l.pace.turn(now) {
		for _, other := range l.callers {
			l.forgetLocked(other, now)
		}
	}
	return l.pace.delay(&c.share, cost, now)
}
