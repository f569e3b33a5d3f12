package main

import (
	"fmt"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

// What an agent hands over beside its listeners, so that the next one does not fetch every
// token of the node again: the cached tokens, and how long the upstream wants no requests.
// A packet begins with its kind; a kind that is not known is skipped.
const (
	packetPause = 'P' // and a time.Duration as text
	packetToken = 'T' // and a tokencache.Snapshot
)

// sendTokens sends what receivedTokens collects; see handover.Duties.
func (a *agent) sendTokens(send func(packet []byte) error) error {
	if pause := time.Until(a.upstream.PausedUntil()); pause > 0 {
		if err := send(append([]byte{packetPause}, pause.String()...)); err != nil {
			return err
		}
	}
	for _, token := range a.tokens.Export() {
		b, err := token.MarshalBinary()
		if err != nil {
			return err
		}
		if err := send(append([]byte{packetToken}, b...)); err != nil {
			return err
		}
	}
	return nil
}

// receivedTokens is what another agent has sent.
type receivedTokens struct {
	pausedUntil time.Time
	tokens      []tokencache.Snapshot
}

// add keeps a packet; see handover.Handover.Acquire.
func (r *receivedTokens) add(packet []byte) error {
	switch kind, content := packet[0], packet[1:]; kind {
	case packetPause:
		pause, err := time.ParseDuration(string(content))
		if err != nil {
			return fmt.Errorf("malformed pause: %w", err)
		}
		r.pausedUntil = time.Now().Add(pause)
	case packetToken:
		var token tokencache.Snapshot
		if err := token.UnmarshalBinary(content); err != nil {
			return err
		}
		r.tokens = append(r.tokens, token)
	}
	return nil
}

// restore puts what was received to use.
func (a *agent) restore(received receivedTokens) {
	a.upstream.PauseUntil(received.pausedUntil)
	if n := a.tokens.Import(received.tokens); n > 0 {
		a.log.Info("restored tokens of the agent that ran before", "tokens", n)
	}
}
