package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// checkSource joins what the API server says of a caller with what the node's links
// say.
func checkSource(tracker *links.Tracker) func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
	return func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
		return confirmation(tracker.Check(addr, ingress, links.Pod{UID: pod.UID, Started: pod.Started}))
	}
}

// expectSource is checkSource without a connection, for explanations.
func expectSource(tracker *links.Tracker) func(addr netip.Addr, pod *podresolver.Pod) error {
	return func(addr netip.Addr, pod *podresolver.Pod) error {
		err := confirmation(tracker.Expect(addr, links.Pod{UID: pod.UID, Started: pod.Started}))
		if err != nil && !errors.Is(err, podresolver.ErrUnconfirmed) {
			return fmt.Errorf("%w: %w", proxy.ErrSource, err) // as the proxy does
		}
		return err
	}
}

// confirmation: that a network does not tell pods apart is final; everything else may be
// mended by news of the pods.
func confirmation(err error) error {
	if err == nil || errors.Is(err, links.ErrUnguarded) {
		return err
	}
	return fmt.Errorf("%w: %w", podresolver.ErrUnconfirmed, err)
}
