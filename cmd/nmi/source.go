package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
)

// confirmCaller joins what the API server says of a caller with what the node's links
// say. That a network does not tell pods apart is final; everything else may be mended by
// news of the pods.
func confirmCaller(tracker *links.Tracker) func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
	return func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
		err := tracker.Check(addr, ingress, links.Pod{UID: pod.UID, Started: pod.Started})
		if err == nil || errors.Is(err, links.ErrUnguarded) {
			return err
		}
		return fmt.Errorf("%w: %w", podresolver.ErrUnconfirmed, err)
	}
}
