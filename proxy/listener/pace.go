package listener

import (
	"runtime"
	"time"
)

// Callers share the agent's CPU. Goroutines run in the order in which they became able to,
// and while one can run the network is not polled (runtime/proc.go, findRunnable): a caller
// that keeps 64 connections busy makes each request of the others wait for 64 of its own. So
// while goroutines wait for longer than maxLag, all callers together are limited to fewer
// requests a second, until they do not; and of these each caller has the same share. Nobody
// is limited before.
const (
	maxLag = time.Millisecond
	// sampleInterval is how often the lag is looked at, while there are more than busyRate
	// requests a second.
	sampleInterval = time.Millisecond
	busyRate       = 500
	// A limit is between these, in requests a second. No agent answers as many as maxLimit,
	// which is therefore none.
	maxLimit, minLimit = 100_000, 2_000
	// minShare is the share of a caller, in requests a second, however many there are. That
	// together they can then exceed the limit is no harm: most pods ask once an hour.
	minShare = 250
	// paceBurst is how many requests a caller may make at once, within its share.
	paceBurst = 16
	// connectionCost is what a new connection counts, in requests.
	connectionCost = 8
	// maxPause bounds how long a request is held back. A caller that is held back for so
	// long makes two requests a second for each of its connections.
	maxPause = 500 * time.Millisecond
	// pipelinedPause comes before a request that a client has sent without waiting for the
	// last response. Its goroutine would not stop running otherwise.
	pipelinedPause = time.Millisecond
	// paceWindow is how long a caller counts as one that asks.
	paceWindow = 100 * time.Millisecond
)

// pace decides when a request may be handled. Limiter.mu guards it.
type pace struct {
	limit    float64 // requests a second of all callers
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

// busy reports whether there are so many requests that the lag must be watched.
func (p *pace) busy() bool {
	const most = busyRate * int(paceWindow) / int(time.Second)
	return p.requests > most || p.requestsBefore > most
}

// observe adapts the limit to the lag.
func (p *pace) observe(lag time.Duration) {
	switch {
	case lag > 4*maxLag:
		p.limit = max(p.limit*0.5, minLimit)
	case lag > maxLag:
		p.limit = max(p.limit*0.8, minLimit)
	case lag < maxLag/2:
		p.limit = min(p.limit*1.02, maxLimit)
	}
}

// delay notes what a caller does, which counts as so many requests, and returns how long
// that has to wait.
func (p *pace) delay(s *share, cost int, now time.Time) time.Duration {
	if s.window != p.window {
		s.window = p.window
		p.active++
	}
	p.requests += cost
	if p.limit >= maxLimit {
		s.next = now
		return 0
	}
	rate := max(p.limit/float64(max(p.active, p.activeBefore)), minShare)
	interval := time.Duration(float64(time.Second) / rate)
	if earliest := now.Add(-paceBurst * interval); s.next.Before(earliest) {
		s.next = earliest
	}
	s.next = s.next.Add(time.Duration(cost) * interval)
	if latest := now.Add(maxPause); s.next.After(latest) {
		s.next = latest
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

// lag is how long a goroutine waits for those that could run before it.
func lag() time.Duration {
	began := time.Now()
	runtime.Gosched()
	return time.Since(began)
}

// observe is pace.observe; it returns false when there are no longer many requests.
func (l *Limiter) observe(lag time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turnLocked(time.Now())
	l.pace.observe(lag)
	if !l.pace.busy() {
		l.pace.watching, l.pace.limit = false, maxLimit
	}
	return l.pace.watching
}
