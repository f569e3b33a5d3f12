// Package links knows the interfaces between the node and its pods: which interface leads
// to a pod, and whether a pod's address can be trusted. The rules need the first, to
// select a mode; callers are checked by the second.
//
// The life of an interface, as the Tracker sees it:
//
//  1. The kernel announces it, and the Tracker records the time.
//  2. A connection comes in over it. The kernel reports the interface
//     (in_pktinfo.ipi_ifindex), and no pod can forge that.
//  3. The API server names a pod for the source address. If the pod's containers started
//     after the interface appeared, the pod becomes the interface's owner; see
//     claimLocked.
//  4. A request of the owner costs a map look-up. Another pod becomes the owner only with
//     containers that started later.
//  5. The kernel announces that the interface is gone. Connections over it are refused.
//     Its owner is accepted on another interface only after its containers restart.
//
// On a bridge, the port of the caller's hardware address takes the interface's place. An
// interface of another kind (a gateway, a physical device) is not one pod's, and the API
// server's answer is accepted unchecked.
package links

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/vishvananda/netlink"
)

// Config configures a Tracker.
type Config struct {
	// AllowUnguarded accepts addresses where pods can take over each other's, unless the
	// bridge port is another pod's.
	AllowUnguarded bool
	// Pods returns the addresses of this node's pods, and a channel that is closed when
	// they have changed. nil leaves the Status empty.
	Pods   func() ([]netip.Addr, <-chan struct{})
	Logger *slog.Logger // nil means slog.Default
}

const (
	// tick is how often an idle Tracker reads announcements: an interface may count as
	// older by as much, see iface.appeared.
	tick = 200 * time.Millisecond
	// After maxBurst announcements without a pause of burstInterval between them, they are
	// read once in burstInterval: a pod that takes its end of its link down and up causes
	// thousands a second, and each would wake the agent.
	maxBurst      = 100
	burstInterval = 10 * time.Millisecond
	// surveyInterval is how often the Status is updated when pods do not change.
	surveyInterval = 10 * time.Second
	// readRetry is the pause after a failed read.
	readRetry = time.Second
	// The route to an address is cached for trustFor if the address can be trusted, else
	// for distrustFor: not all changes that affect it are announced.
	trustFor    = 5 * time.Second
	distrustFor = time.Second
	// maxAddresses bounds the caches by address, at many times a node's pods.
	maxAddresses = 4096
	// maxDeparted bounds the owners of interfaces that are gone.
	maxDeparted = 1024
)

// Tracker watches the node's interfaces, and checks by them which pod is calling.
type Tracker struct {
	cfg     Config
	socket  *socket
	refused atomic.Uint64
	status  atomic.Pointer[Status]
	warned  []string // links in the last warning; used by Run only

	mu     sync.RWMutex // guards all below
	ifaces map[int]*iface
	routes map[netip.Addr]*route
	ports  map[netip.Addr]port
	// departed has the owners of interfaces that are gone: Pod.Started by Pod.UID.
	departed *simplelru.LRU[string, time.Time]
	events   eventState
}

// route is the cached route to an address.
type route struct {
	Link
	err   error
	until time.Time
}

// New returns a Tracker of the current interfaces, which records changes from now on. Run
// must be called.
func New(cfg Config) (*Tracker, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	departed, err := simplelru.NewLRU[string, time.Time](maxDeparted, nil)
	if err != nil {
		return nil, err
	}
	t := &Tracker{
		cfg: cfg, departed: departed,
		ifaces: make(map[int]*iface), routes: make(map[netip.Addr]*route), ports: make(map[netip.Addr]port),
	}
	t.status.Store(&Status{})
	if t.socket, err = subscribe(); err != nil {
		return nil, fmt.Errorf("watching the node's interfaces: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.events.lost = true // for the first listing
	if err := t.drainLocked(); err != nil {
		return nil, errors.Join(fmt.Errorf("listing the node's interfaces: %w", err), t.socket.close())
	}
	return t, nil
}

// Run reads the kernel's announcements and updates the Status until ctx ends.
func (t *Tracker) Run(ctx context.Context) {
	defer t.socket.close() //nolint:errcheck // nothing was written
	var podsChanged <-chan struct{}
	var nextSurvey time.Time
	burst := 0 // announcements without a pause between them
	for ctx.Err() == nil {
		select {
		case <-podsChanged:
			nextSurvey = time.Time{}
		default:
		}
		if now := time.Now(); t.cfg.Pods != nil && now.After(nextSurvey) {
			podsChanged, nextSurvey = t.survey(), now.Add(surveyInterval)
		}
		waiting := time.Now()
		err := t.socket.wait(tick)
		if time.Since(waiting) >= burstInterval {
			burst = 0
		}
		t.mu.Lock()
		before := t.events.received
		err = errors.Join(err, t.drainLocked())
		burst += t.events.received - before
		t.mu.Unlock()
		var pause time.Duration
		switch {
		case err != nil:
			pause = readRetry
			t.cfg.Logger.WarnContext(ctx, "reading the kernel's announcements of interfaces failed; retrying", "error", err, "in", pause)
		case burst > maxBurst:
			pause = burstInterval
		default:
			continue
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// Stats are counts since New.
type Stats struct {
	Refused uint64 // checks that ended in ErrReused
}

// Stats returns the counts so far.
func (t *Tracker) Stats() Stats { return Stats{Refused: t.refused.Load()} }

// Check returns nil if a connection from addr that came in over the interface with the
// index ifindex can only be that of pod, which the API server names for the address. Its
// error wraps ErrUnguarded if other pods can take over the address, and ErrReused if the
// address may be another pod's by now. Other errors are temporary.
func (t *Tracker) Check(addr netip.Addr, ifindex int, pod Pod) error {
	if pod.UID == "" {
		return errors.New("the pod's object has no UID")
	}
	now := time.Now()
	t.mu.RLock()
	ingress, route := t.ifaces[ifindex], t.routes[addr]
	known := ingress != nil && route != nil && route.err == nil && now.Before(route.until) &&
		(ingress.kind == kindOther || ingress.kind == kindPod && ingress.owner.UID == pod.UID && !pod.Started.After(ingress.owner.Started))
	t.mu.RUnlock()
	if known {
		return nil
	}
	err := t.check(addr, ifindex, pod, now)
	if errors.Is(err, ErrReused) {
		t.refused.Add(1)
	}
	return err
}

// check is Check without the fast path.
func (t *Tracker) check(addr netip.Addr, ifindex int, pod Pod, now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	// The kernel has announced all that happened before the connection.
	if err := t.drainLocked(); err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	route := t.routeLocked(addr, now)
	if errors.Is(route.err, ErrUnguarded) {
		return route.err
	}
	ingress := t.ifaces[ifindex]
	if ingress == nil {
		return fmt.Errorf("%w: its interface (index %d) is gone", ErrReused, ifindex)
	}
	if err := ingress.classify(); err != nil {
		return err
	}
	switch {
	case ingress.kind == kindPod && route.Shared && route.Index == ifindex:
		return nil // a subnet is behind it, not one pod
	case ingress.kind == kindPod:
		if ingress.owner.UID != pod.UID { // the owner may call while its route is removed and added
			if other := t.routedToLocked(ingress, addr); other != "" {
				return fmt.Errorf("%w: the route to %s leads to %s, and the connection came in over %s", ErrReused, addr, other, ingress.name)
			}
		}
		return t.claimLocked(ingress, pod, now)
	case ingress.kind == kindBridge:
		return t.checkPortLocked(ingress, addr, pod, now)
	default:
		return route.err
	}
}

// routedToLocked returns the name of another pod's interface that the route to an address
// leads to; "" for none. The handshake's replies went there: a pod on the ingress
// interface has guessed the sequence number (SYN cookies, RFC 4987), and must not become
// its owner.
func (t *Tracker) routedToLocked(ingress *iface, addr netip.Addr) string {
	link, err := NewFinder().Find(addr)
	other := t.ifaces[link.Index]
	if err != nil || link.Shared || other == nil || other == ingress || other.classify() != nil || other.kind != kindPod {
		return ""
	}
	return other.name
}

// Expect returns what Check would return for a connection from addr over the interface
// that the route to addr leads to. It does not check bridge ports, and records nothing.
func (t *Tracker) Expect(addr netip.Addr, pod Pod) error {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.drainLocked(); err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	delete(t.routes, addr) // it may lead to a former interface
	route := t.routeLocked(addr, now)
	ingress := t.ifaces[route.Index]
	if route.err != nil || ingress == nil || route.Shared {
		return route.err
	}
	if err := ingress.classify(); err != nil || ingress.kind != kindPod {
		return err
	}
	return t.checkClaimLocked(ingress, pod, now)
}

// routeLocked returns the route to an address, with ErrUnguarded if other pods can take
// over the address there.
func (t *Tracker) routeLocked(addr netip.Addr, now time.Time) *route {
	if known, ok := t.routes[addr]; ok && now.Before(known.until) {
		return known
	}
	found := &route{until: now.Add(trustFor)}
	switch found.Link, found.err = NewFinder().Find(addr); {
	case errors.Is(found.err, errGateway):
		found.err = nil // shares no link with other pods; the plugin must prevent spoofing
	case found.err != nil:
		found.err = fmt.Errorf("address %s %w", addr, found.err)
	case found.Shared && !found.Pinned && !t.cfg.AllowUnguarded:
		found.err = fmt.Errorf("%w: %s, address %s", ErrUnguarded, found.Name, addr)
	}
	if found.err != nil {
		found.until = now.Add(distrustFor)
	}
	if len(t.routes) >= maxAddresses {
		clear(t.routes)
	}
	t.routes[addr] = found
	return found
}

// kind is what an interface proves about callers.
type kind uint8

const (
	kindUnknown kind = iota // not classified yet
	kindPod                 // one pod is at the other end
	kindBridge              // ports of it lead to pods
	kindOther               // nothing
)

// classify finds out the kind of an interface. A pod's is a pair whose other end is in
// another network namespace (both ends of the veth cilium_host are the node's). Another
// kind may become a pod's: a pair is created before one of its ends is moved.
func (i *iface) classify() error {
	if i.kind == kindPod || i.kind == kindBridge {
		return nil
	}
	link, err := netlink.LinkByIndex(i.index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", i.name, err)
	}
	switch kind := link.Type(); {
	case kind == "bridge":
		i.kind = kindBridge
	case isPodLink(link):
		i.kind = kindPod
	default:
		i.kind = kindOther
	}
	return nil
}

// isPodLink reports whether an interface is one end of a pair, and the other end is in
// another network namespace.
func isPodLink(link netlink.Link) bool {
	return (link.Type() == "veth" || link.Type() == "netkit") && link.Attrs().NetNsID >= 0 // IFLA_LINK_NETNSID
}
