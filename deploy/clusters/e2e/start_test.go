//go:build cluster

package e2e

import (
	"fmt"
	"testing"
	"time"
)

func TestInitContainer(t *testing.T) {
	s := begin(t, "An init container that asks at once gets its token, without trying again.", theIMDS)
	s.bind("cart", cart)
	first := asks(s.token(cart))
	s.start(pod{name: "cart", binding: "cart", init: &first, askers: []asker{asks(s.token(cart))}})
	s.finish()
}

func TestTwentyPodsInTheirFirstSecond(t *testing.T) {
	s := begin(t, "20 pods that start together and ask all through their first second get every token.", theIMDS)
	s.bind("cart", cart)
	s.watchAddresses()
	for i := range 20 {
		s.start(pod{name: fmt.Sprintf("cart-%d", i), binding: "cart", askers: []asker{{requests: []request{s.token(cart)}, n: 10, every: 100 * time.Millisecond}}})
	}
	s.finish()
}

func TestFortyPodsOfDifferentIdentities(t *testing.T) {
	s := begin(t, "Of 40 pods that start together each gets its own identity's token, or none; with an SDK's retries.", theIMDS)
	s.bind("cart", cart)
	s.bind("report", report)
	// The kubelet of a busy node takes its time to tell the API server the addresses of so many.
	retries := func(requests ...request) []asker { return []asker{{requests: requests, retry: true}} }
	kinds := []pod{
		{binding: "cart", askers: retries(s.token(cart), s.token(cart))},
		{binding: "report", askers: retries(s.token(report), s.refused("client_id="+cart.ClientID))},
		{askers: retries(s.refused(), s.refused("client_id="+report.ClientID))},
	}
	for i := range 40 {
		p := kinds[i%len(kinds)]
		p.name = fmt.Sprintf("pod-%d", i)
		s.start(p)
	}
	s.finish()
}
