package limiter

// Stats is how many requests there are now.
type Stats struct {
	Waiting  int // in the queue
	InFlight int // with a slot
}

// Stats returns the counts as they are now.
func (l *Limiter) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Waiting: len(l.waiters), InFlight: l.inFlight}
}
