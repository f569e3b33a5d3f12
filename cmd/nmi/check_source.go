package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/podidentity/nmi/cmd/nmi/handover"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/listener"
)

// checkSource is proxy.Config.CheckSource.
func (a *agent) checkSource() func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
	if a.cfg.rules.Mode == iptables.EBPF {
		return checkLink(a.links)
	}
	return checkSource(a.links)
}

// onlyPods is the listener without the connections that are no pod's.
func (a *agent) onlyPods(ln *handover.Listener) (net.Listener, error) {
	if err := listener.OnlyTo(ln.TCPListener, a.cfg.destinations()...); err != nil {
		return nil, err
	}
	switch a.cfg.rules.Mode {
	case iptables.None:
		return ln, nil
	case iptables.EBPF:
		return listener.OnlyIdentified(ln, a.identify), ebpf.Listen(ln.TCPListener)
	default:
		return listener.OnlyRedirected(ln, a.cfg.rules.Metadata), nil
	}
}

// destinations are the addresses of the node that connections may come to; nil for all. In mode
// ebpf no rule drops connections that were not redirected, and to find out that one was not takes
// the agent longer than the kernel.
func (c *config) destinations() []netip.Addr {
	switch {
	case c.rules.Mode != iptables.EBPF:
		return nil
	case len(c.proxy.HostTokenUIDs) > 0:
		return []netip.Addr{c.rules.Address, netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	return []netip.Addr{c.rules.Address}
}

// identify returns the caller of a connection in mode ebpf.
func (a *agent) identify(conn *net.TCPConn) (netip.Addr, error) {
	uid, err := a.rules.Caller(conn)
	if err != nil {
		if a.unidentified.Allow() {
			a.log.Warn("refused a connection whose caller is unknown", "from", conn.RemoteAddr().String(), "error", err)
		}
		return netip.Addr{}, err
	}
	return podresolver.ByUID(uid), nil
}

// checkLink is for callers whose pod the kernel has named: only what is sent to them may go astray.
func checkLink(tracker *links.Tracker) func(addr netip.Addr, ingress int, pod *podresolver.Pod) error {
	return func(_ netip.Addr, ingress int, pod *podresolver.Pod) error {
		return unconfirmed(tracker.Guarded(ingress, pod.Addresses()))
	}
}

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
