package imdstest

import "time"

// peak counts requests, as a limiter in front of the service should see them.
type peak struct {
	now       int // being answered
	atOnce    int // the most there were of them
	perSecond int // the most that came in any one second
	// recent is when requests came, oldest first: those of the last second alone.
	recent []time.Time
}

// arrive counts a request that came at now, which is not before any other's.
func (p *peak) arrive(now time.Time) {
	p.now++
	p.atOnce = max(p.atOnce, p.now)
	for len(p.recent) > 0 && now.Sub(p.recent[0]) >= time.Second {
		p.recent = p.recent[1:] // append drops what is left behind when it next grows
	}
	p.recent = append(p.recent, now)
	p.perSecond = max(p.perSecond, len(p.recent))
}
