package listener

import (
	"math/rand/v2"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Callers share the agent's CPU. Goroutines run in the order in which they became runnable,
// and the network is not polled while one is (runtime/proc.go, findRunnable): with a caller
// that keeps 64 connections busy, each request of others would wait for 64 requests. So while
// more than one caller is active, each is held to a share of what the CPU serves. One that is
// alone takes nothing from others.
//
// What a caller does is counted in requests of the fast path, see Next.
const (
	// serverCost is what a request counts that an http.Server parses, and each KiB of its
	// head; connectionCost is for a new connection.
	serverCost     = 2
	connectionCost = 8
	// busyShare is how much of the CPU active callers may use together. The rest is for
	// their unevenness, and for what the agent does besides.
	busyShare = 0.7
	// minShare is the least share of a caller, in requests a second. With many callers the
	// sum exceeds what the CPU serves, which does no harm: most pods send a request an hour.
	minShare = 500
	// paceBurst is how many requests of a caller may come at once, within its share.
	paceBurst = 32
	// maxPause bounds how long a request is held back. A caller with longer pauses than that
	// makes less than a request a second for each of its connections.
	maxPause = 2 * time.Second
	// pipelinedPause precedes a request that was sent before the last response was read.
	// Its goroutine would stay runnable otherwise. No SDK pipelines.
	pipelinedPause = 10 * time.Millisecond
	// paceWindow is how long a caller counts as active after a request.
	paceWindow = 100 * time.Millisecond
)

// The CPU time of a request is measured over as many windows as have enough of them. At first it is
// taken to be initialCost, which is more than most machines need: a flood that comes first must not
// fill the CPU until its cost is known. The bounds are far from what any machine needs.
const (
	minMeasured            = 200
	initialCost            = 50 * time.Microsecond
	leastCost, largestCost = 4 * time.Microsecond, 100 * time.Microsecond
)

// pace decides when a request may be handled. Limiter.mu guards it.
type pace struct {
	cpuTime func() time.Duration // that the process has used so far
	cpus    func() int           // that it may use at once

	began  time.Time // of the window
	window int       // its number; from 1
	active int       // callers with a request in it
	before int       // callers with one in the window before
	added  int       // callers with one in it, and none in the window before

	requests int           // since the last measurement
	used     time.Duration // CPU time before that
	cost     time.Duration // CPU time of a request
	rate     float64       // of requests a second that active callers may make together
}

func newPace() pace {
	return pace{cpuTime: processCPUTime, cpus: func() int { return runtime.GOMAXPROCS(0) }, cost: initialCost} // GOMAXPROCS follows the limits of the cgroup
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
	used := p.cpuTime()
	switch {
	case p.requests >= minMeasured:
		measured := min(max((used-p.used)/time.Duration(p.requests), leastCost), largestCost)
		p.cost = max(measured, p.cost+(measured-p.cost)/4) // it rises at once
		fallthrough
	case p.before+p.active == 0:
		p.requests, p.used = 0, used
	}
	p.rate = busyShare * float64(p.cpus()) * float64(time.Second) / float64(p.cost)
	p.before = p.active
	if elapsed >= 2*paceWindow {
		p.before = 0
	}
	p.began, p.active, p.added = now, 0, 0
	p.window++
	return true
}

// delay notes what a caller does, which counts as cost requests, and returns how long that
// must wait.
func (p *pace) delay(s *share, cost int, now time.Time) time.Duration {
	p.requests += cost
	if s.window != p.window {
		p.active++
		if s.window != p.window-1 || p.before == 0 {
			p.added++
		}
		s.window = p.window
	}
	active := p.before + p.added
	if active == 1 {
		return 0
	}
	interval := time.Duration(float64(time.Second) / max(p.rate/float64(active), minShare))
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
func (l *Limiter) delayLocked(c *caller, cost int, now time.Time) time.Duration {
	if l.pace.turn(now) {
		for _, other := range l.callers {
			l.forgetLocked(other, now)
		}
	}
	return l.pace.delay(&c.share, cost, now)
}

// processCPUTime is the CPU time that the process has used so far.
func processCPUTime() time.Duration {
	var used unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &used); err != nil { // never
		return 0
	}
	return time.Duration(used.Nano())
}
