package openloop

import "time"

// schedule says when requests are to be sent: the first at the start and the others at
// equal distances, whatever becomes of those before them.
type schedule struct {
	interval float64 // nanoseconds
	total    int
	next     int // the request to send next
}

func newSchedule(rate float64, length time.Duration) schedule {
	return schedule{interval: float64(time.Second) / rate, total: int(rate * length.Seconds())}
}

// due is when request i is to be sent, after the start.
func (s *schedule) due(i int) time.Duration { return time.Duration(float64(i) * s.interval) }

// take returns when the next request was due, if it is due at elapsed, and goes on to
// the one after it.
func (s *schedule) take(elapsed time.Duration) (due time.Duration, ok bool) {
	if s.next == s.total {
		return 0, false
	}
	if due = s.due(s.next); due > elapsed {
		return 0, false
	}
	s.next++
	return due, true
}
