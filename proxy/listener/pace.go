package listener

import (
	"math/rand/v2"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Callers share the agent's CPU. Goroutines run in the order in which they became runnable,
// and the network is not polled while one is (runtime/proc.go, findRunnable): with a caller
// that keeps 64 connections busy, each request of others would wait for 64 requests. So all
// callers together are limited to a rate that follows the lag: how long runnable goroutines
// wait. It shrinks while the lag is high, and grows while it is low and the limit is used, as
// TCP's congestion window does (RFC 5681): fast at first, slowly once it has been too much. Of
// the limit each caller has the same share.
const (
	maxLag = time.Millisecond
	// sampleInterval is how often the lag is measured, while there are more than busyRate
	// requests a second.
	sampleInterval = time.Millisecond
	busyRate       = 500
	// The limit, in requests a second: at least, and at first, half of what a core serves; at
	// most, more than any agent serves.
	minLimit, maxLimit = 10_000, 100_000
	// The limit grows by a factor with each sample, and slowly by a number: to maxLimit in
	// a tenth of a second, and by 20,000 a second.
	growth, slowGrowth = 1.02, 20
	// minShare is the least share of a caller, in requests a second. With many callers the
	// sum exceeds the limit, which does no harm: most pods send a request an hour.
	minShare = 250
	// paceBurst is how many requests of a caller may come at once, within its share.
	paceBurst = 16
	// connectionCost is what a new connection counts, in requests. Each KiB of a head counts
	// one.
	connectionCost = 8
	// maxPause bounds how long a request is held back. A caller with longer pauses than that
	// makes less than a request a second for each of its connections.
	maxPause = 2 * time.Second
	// pipelinedPause precedes a request that was sent before the last response was read.
	// Its goroutine would stay runnable otherwise.
	pipelinedPause = time.Millisecond
	// paceWindow is how long a caller counts as active after a request.
	paceWindow = 100 * time.Millisecond
)

// pace decides when a request may be handled. Limiter.mu guards it.
type pace struct {
	limit    float64 // requests a second of all callers
	slow     bool    // the limit has been too high
	watching bool    // a goroutine samples the lag

	began    time.Time // of the window
	window   int       // its number; from 1
	active   int       // callers that have asked in it
	requests int       // in it
	// The same of the window before.
	activeBefore, requestsBefore int
}

// share is what a pace keeps of a caller.
type share struct {
	window int       // the last one with a request
	next   time.Time // when its next request may be handled
}

// turn begins a new window if it is time, and reports whether it was.
func (p *pace) turn(now time.Time) bool {
	elapsed := now.Sub(p.began)
	if elapsed < paceWindow {
		return false
	}
	p.activeBefore, p.requestsBefore = p.active, p.requests
	if elapsed >= 2*paceWindow {
		p.activeBefore, p.requestsBefore = 0, 0
	}
	p.began, p.active, p.requests = now, 0, 0
	p.window++
	return true
}

// busy reports whether there are so many requests that the lag must be measured.
func (p *pace) busy() bool { return p.rate() > busyRate }

// observe adapts the limit to the lag.
func (p *pace) observe(lag time.Duration) {
	switch {
	case lag > 4*maxLag:
		p.limit, p.slow = p.limit*0.5, true
	case lag > maxLag:
		p.limit, p.slow = p.limit*0.8, true
	case lag > maxLag/2 || 2*p.rate() < p.limit: // good, or not used
	case p.slow:
		p.limit += slowGrowth
	default:
		p.limit *= growth
	}
	p.limit = min(max(p.limit, minLimit), maxLimit)
}

// rate is how many requests a second there are.
func (p *pace) rate() float64 {
	return float64(max(p.requests, p.requestsBefore)) / paceWindow.Seconds()
}

// delay notes what a caller does, which counts as cost requests, and returns how long that
// must wait.
func (p *pace) delay(s *share, cost int, now time.Time) time.Duration {
	if s.window != p.window {
		s.window = p.window
		p.active++
	}
	p.requests += cost
	rate := max(p.limit/float64(max(p.active, p.activeBefore)), minShare)
	interval := time.Duration(float64(time.Second) / rate)
	if earliest := now.Add(-paceBurst * interval); s.next.Before(earliest) {
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
	l.turnLocked(now)
	delay := l.pace.delay(&c.share, cost, now)
	if !l.pace.watching && l.pace.busy() {
		l.pace.watching = true
		go l.watchLag()
	}
	return delay
}

func (l *Limiter) turnLocked(now time.Time) {
	if !l.pace.turn(now) {
		return
	}
	for _, c := range l.callers {
		l.forgetLocked(c, now)
	}
}

// watchLag adapts the limit while there are many requests.
func (l *Limiter) watchLag() {
	for l.observe(lag()) {
		time.Sleep(sampleInterval)
	}
}

// lag is how long a goroutine waits for those that were runnable before it, not counting the
// time that the node gave to other processes.
func lag() time.Duration {
	began, cpu := time.Now(), cpuTime()
	runtime.Gosched()
	return min(time.Since(began), cpuTime()-cpu)
}

// cpuTime is what this process has used so far.
func cpuTime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// observe is pace.observe; it returns false when there are no longer many requests.
func (l *Limiter) observe(lag time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turnLocked(time.Now())
	l.pace.observe(lag)
	if !l.pace.busy() {
		l.pace.watching, l.pace.limit, l.pace.slow = false, minLimit, false
	}
	return l.pace.watching
}
