package listener

import "time"

// Callers share the agent's CPU. Its goroutines are scheduled first come, first served, and
// while one can run the network is not polled (runtime/proc.go, findRunnable): a caller that
// keeps 64 connections busy would make each request of the others wait for 64 of its own.
// So while more than one caller asks, each is held to a share. A single one may have all.
const (
	// sharedRate is how many requests a second all callers that ask at present share:
	// about what one core answers.
	sharedRate = 16_000
	// leastRate is the share of a caller, however many there are. That together they can
	// then ask for more than sharedRate is no harm: most pods ask once an hour.
	leastRate = 2_000
	// paceBurst is how many requests a caller may make at once, within its share.
	paceBurst = 8
	// paceWindow is how long a caller counts as one that asks.
	paceWindow = 100 * time.Millisecond
)

// pace decides when a request may be handled. Its callers hold a lock.
type pace struct {
	began  time.Time // of the window
	window int       // its number; from 1
	active int       // callers that have asked in it
	before int       // callers that asked in the window before
}

// share is what a pace keeps of a caller.
type share struct {
	window int       // the last one in which it asked
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

// delay notes a request, and returns how long it has to wait.
func (p *pace) delay(s *share, now time.Time) time.Duration {
	if s.window != p.window {
		s.window = p.window
		p.active++
	}
	asking := max(p.active, p.before)
	if asking < 2 {
		s.next = now
		return 0
	}
	interval := time.Second / time.Duration(max(sharedRate/asking, leastRate))
	if earliest := now.Add(-paceBurst * interval); s.next.Before(earliest) {
		s.next = earliest
	}
	s.next = s.next.Add(interval)
	return max(0, s.next.Sub(now))
}

// forgets reports whether a share no longer differs from a new one.
func (p *pace) forgets(s *share, now time.Time) bool {
	return s.window == 0 || s.window < p.window-1 && s.next.Before(now)
}
