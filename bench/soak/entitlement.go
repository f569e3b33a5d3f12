package main

import (
	"slices"
	"sync"
	"time"
)

// propagation is how long after a change of the API server's objects an answer by the old
// ones is still right: the agent decides by the events of its watches, which usually takes
// milliseconds, but the machine may be busy.
const propagation = 5 * time.Second

// none stands for no identity: the pod is to be refused.
const none = ""

// entitlement is which identity the pods of one selector are entitled to, over time. Changes
// overlap: one is in force from just before the API server is asked for it, and ends the one
// before when the API server has answered.
type entitlement struct {
	mu    sync.Mutex // guards spans
	spans []span
}

type span struct {
	clientID    string
	from, until time.Time // until is zero for the last
}

// change makes a change by calling write.
func (e *entitlement) change(clientID string, write func() error) error {
	e.mu.Lock()
	e.spans = append(e.spans, span{clientID: clientID, from: time.Now()})
	e.mu.Unlock()
	err := write()
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if n := len(e.spans); n > 1 {
		e.spans[n-2].until = now
	}
	// Nobody waits longer than patience for an answer.
	e.spans = slices.DeleteFunc(e.spans, func(s span) bool {
		return !s.until.IsZero() && now.Sub(s.until) > patience+propagation
	})
	return err
}

// between returns the identities that may have been answered with for a request that was sent
// and answered at these times.
func (e *entitlement) between(sent, answered time.Time) (clientIDs []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.spans {
		if !s.from.After(answered) && (s.until.IsZero() || !s.until.Add(propagation).Before(sent)) {
			clientIDs = append(clientIDs, s.clientID)
		}
	}
	return clientIDs
}
