package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// checkSource compares the pod that the API server names for an address with the pod whose
// interface the connection came in over; see proxy.Config.CheckSource.
func checkSource(tracker *links.Tracker) func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
	return func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
		return unconfirmed(tracker.Check(addr, ingress, links.Pod{UID: pod.UID, Started: pod.Started}))
	}
}

// expectSource is checkSource for nmi explain, which has no connection.
func expectSource(tracker *links.Tracker) func(addr netip.Addr, pod *podresolver.Pod) error {
	return func(addr netip.Addr, pod *podresolver.Pod) error {
		err := unconfirmed(tracker.Expect(addr, links.Pod{UID: pod.UID, Started: pod.Started}))
		if err != nil && !errors.Is(err, podresolver.ErrUnconfirmed) {
			return fmt.Errorf("%w: %w", proxy.ErrSource, err) // as the proxy does
		}
		return err
	}
}

// unconfirmed marks an error that newer news of the pods may mend, which the proxy waits
// for. A network that does not tell pods apart is final.
func unconfirmed(err error) error {
	if err == nil || errors.Is(err, links.ErrUnguarded) {
		return err
	}
	return fmt.Errorf("%w: %w", podresolver.ErrUnconfirmed, err)
}
