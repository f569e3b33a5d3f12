package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/tokencache"
)

// What an agent hands over beside its listeners. With the cached tokens, and how long the
// upstream wants no requests, the next one need not fetch every token of the node again. With
// what is known of the node's interfaces, it does not take an address's next pod for the last
// one. A packet begins with its kind; a kind that is not known is skipped.
const (
	packetLink  = 'L' // and a links.Snapshot in JSON
	packetPause = 'P' // and a time.Duration as text
	packetToken = 'T' // and a tokencache.Snapshot
)

// minPause is for the fetches of the other agent's last second, which count against Azure's limits,
// too.
const minPause = time.Second

// sendState sends what receivedState collects; see handover.Duties. Tokens come last: there is a
// deadline, and what does not arrive of them is fetched.
func (a *agent) sendState(send func(packet []byte) error) error {
	pause := max(time.Until(a.upstream.PausedUntil()), minPause)
	if err := send(append([]byte{packetPause}, pause.String()...)); err != nil {
		return err
	}
	interfaces, err := a.links.Export()
	if err != nil {
		return err
	}
	for _, link := range interfaces {
		b, err := json.Marshal(link)
		if err != nil {
			return err
		}
		if err := send(append([]byte{packetLink}, b...)); err != nil {
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

// receivedState is what another agent has sent.
type receivedState struct {
	links       []links.Snapshot
	pausedUntil time.Time
	tokens      []tokencache.Snapshot
}

// add keeps a packet; see handover.Handover.Acquire.
func (r *receivedState) add(packet []byte) error {
	switch kind, content := packet[0], packet[1:]; kind {
	case packetLink:
		var link links.Snapshot
		if err := json.Unmarshal(content, &link); err != nil {
			return fmt.Errorf("malformed interface: %w", err)
		}
		r.links = append(r.links, link)
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
func (a *agent) restore(received receivedState) {
	if err := a.links.Import(received.links); err != nil {
		a.log.Warn("what the agent that ran before knew of the node's interfaces is lost", "error", err)
	}
	a.upstream.PauseUntil(received.pausedUntil)
	if n := a.tokens.Import(received.tokens); n > 0 {
		a.log.Info("restored tokens of the agent that ran before", "tokens", n)
	}
}
