// Package links knows the interfaces between the node and its pods: which one leads to
// a pod, and whether a connection that came in over one can be that of the pod which the
// API server names for its source address.
//
// The life of an interface, to the Tracker:
//
//  1. The kernel announces it, and the Tracker notes when that was.
//  2. A connection comes in over it. The kernel says over which interface
//     (in_pktinfo.ipi_ifindex), and no pod can forge that.
//  3. The API server names a pod for the source address. If the pod's containers
//     started after the interface appeared, it is the interface's holder from then on;
//     see claimLocked.
//  4. A request of the holder costs a look-up. Another pod becomes the holder only with
//     younger containers.
//  5. The kernel announces that the interface is gone. No caller comes over it any more.
//     Its holder is remembered: it must restart its containers to be seen elsewhere.
//
// On a bridge, the port of the caller's hardware address takes the interface's place.
// An interface of another kind (a gateway, a physical device) is not one pod's: there
// the API server's word stands.
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

// Config is what a Tracker can be told.
type Config struct {
	// AllowUnguarded accepts source addresses where pods can take over each other's, as
	// long as the bridge port is not another pod's.
	AllowUnguarded bool
	// Pods returns the addresses of this node's pods, and a channel that is closed when
	// they have changed. nil leaves the Status empty.
	Pods   func() ([]netip.Addr, <-chan struct{})
	Logger *slog.Logger // nil means slog.Default
}

const (
	// tick is how often an idle Tracker reads from the kernel: an interface may be
	// taken for older than it is by as much, see iface.appeared.
	tick = 200 * time.Millisecond
	// surveyInterval is how often the links of all pods are looked at for the Status when
	// the pods are the same.
	surveyInterval = 10 * time.Second
	// readRetry is the pause after a failed read.
	readRetry = time.Second
	// What was found of the route to an address is remembered for trustFor if the
	// address can be trusted, else for distrustFor. Nothing announces all that bears on
	// it.
	trustFor    = 5 * time.Second
	distrustFor = time.Second
	// maxAddresses bounds what is remembered of addresses: many times the pods that a
	// node can have.
	maxAddresses = 4096
	// maxDeparted bounds the pods that are remembered when their interface is gone.
	maxDeparted = 1024
)

// Tracker watches the node's interfaces, and judges by them which pod is calling.
type Tracker struct {
	cfg     Config
	socket  *socket
	refused atomic.Uint64
	status  atomic.Pointer[Status]
	warned  []string // links that were last warned of; for Run alone

	mu     sync.RWMutex // guards all below
	ifaces map[int]*iface
	routes map[netip.Addr]*route
	ports  map[netip.Addr]port
	// departed is when the containers of pods started whose interface is gone, by UID.
	departed *simplelru.LRU[string, time.Time]
	events   eventState
}

// route is where the node's route to an address leads, and for how long that is
// remembered.
type route struct {
	Link
	err   error
	until time.Time
}

// New returns a Tracker that knows the interfaces that there are, and notices changes
// from here on. Run must be called.
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

// Run reads what the kernel announces, and keeps the Status, until ctx ends.
func (t *Tracker) Run(ctx context.Context) {
	defer t.socket.close() //nolint:errcheck // nothing was written
	var podsChanged <-chan struct{}
	var nextSurvey time.Time
	for ctx.Err() == nil {
		select {
		case <-podsChanged:
			nextSurvey = time.Time{}
		default:
		}
		if now := time.Now(); t.cfg.Pods != nil && now.After(nextSurvey) {
			podsChanged, nextSurvey = t.survey(), now.Add(surveyInterval)
		}
		err := t.socket.wait(tick)
		t.mu.Lock()
		err = errors.Join(err, t.drainLocked())
		t.mu.Unlock()
		if err == nil {
			continue
		}
		t.cfg.Logger.WarnContext(ctx, "cannot read the kernel's announcements of interfaces; trying again", "error", err, "in", readRetry)
		select {
		case <-time.After(readRetry):
		case <-ctx.Done():
		}
	}
}

// Stats are counts since New.
type Stats struct {
	Refused uint64 // checks that ended in ErrReused
}

// Stats returns what has been counted so far.
func (t *Tracker) Stats() Stats { return Stats{Refused: t.refused.Load()} }

// Check returns nil if a connection from a source address, which came in over the
// interface of that index, can only be that of the pod which the API server names for
// the address. Its error wraps ErrUnguarded if the node's network does not tell which pod
// is calling, and ErrReused if the address may be another pod's by now. Any other says
// why it cannot be told now.
func (t *Tracker) Check(addr netip.Addr, ifindex int, pod Pod) error {
	if pod.UID == "" {
		return errors.New("the pod's object has no UID")
	}
	now := time.Now()
	t.mu.RLock()
	on, route := t.ifaces[ifindex], t.routes[addr]
	known := on != nil && route != nil && route.err == nil && now.Before(route.until) &&
		(on.kind == kindOther || on.kind == kindPod && on.holder.UID == pod.UID && !pod.Started.After(on.holder.Started))
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

// check is Check without the short cut.
func (t *Tracker) check(addr netip.Addr, ifindex int, pod Pod, now time.Time) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	// What happened before the connection came, the kernel has announced by now.
	if err := t.drainLocked(); err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	route := t.routeLocked(addr, now)
	if errors.Is(route.err, ErrUnguarded) {
		return route.err
	}
	on := t.ifaces[ifindex]
	if on == nil {
		return fmt.Errorf("%w: its interface (index %d) is gone", ErrReused, ifindex)
	}
	if err := on.classify(); err != nil {
		return err
	}
	switch {
	case on.kind == kindPod && route.Shared && route.Index == ifindex:
		return nil // a subnet is behind it, and not one pod
	case on.kind == kindPod:
		if on.holder.UID != pod.UID { // one that is known there may ask while its route comes and goes
			if other := t.routedToLocked(on, addr); other != "" {
				return fmt.Errorf("%w: the route to %s leads to %s, and the connection came in over %s", ErrReused, addr, other, on.name)
			}
		}
		return t.claimLocked(on, pod, now)
	case on.kind == kindBridge:
		return t.checkPortLocked(on, addr, pod, now)
	default:
		return route.err
	}
}

// routedToLocked returns the name of another pod's interface that the node's route to an
// address leads to; "" if it leads to none. The answers that made up a handshake went
// there: only a pod that guessed its numbers (with SYN cookies, RFC 4987) gets as far over
// its own interface, and it must not become the holder of that.
func (t *Tracker) routedToLocked(on *iface, addr netip.Addr) string {
	link, err := NewFinder().Find(addr)
	other := t.ifaces[link.Index]
	if err != nil || link.Shared || other == nil || other == on || other.classify() != nil || other.kind != kindPod {
		return ""
	}
	return other.name
}

// Expect returns what Check would say of a connection from a pod's address that came in over
// the interface which the node's route to the address leads to, as far as that can be known
// without one: of pods behind a bridge it is not. It records nothing.
func (t *Tracker) Expect(addr netip.Addr, pod Pod) error {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.drainLocked(); err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	delete(t.routes, addr) // what is remembered may be of the interface before
	route := t.routeLocked(addr, now)
	on := t.ifaces[route.Index]
	if route.err != nil || on == nil || route.Shared {
		return route.err
	}
	if err := on.classify(); err != nil || on.kind != kindPod {
		return err
	}
	return t.judgeLocked(on, pod, now)
}

// routeLocked returns where the route to an address leads, and ErrUnguarded where others
// can take the address over there.
func (t *Tracker) routeLocked(addr netip.Addr, now time.Time) *route {
	if known, ok := t.routes[addr]; ok && now.Before(known.until) {
		return known
	}
	found := &route{until: now.Add(trustFor)}
	switch found.Link, found.err = NewFinder().Find(addr); {
	case errors.Is(found.err, errGateway):
		found.err = nil // not on one link with other pods; it is the plugin's to guard
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

// kind is what an interface says about the callers that come in over it.
type kind uint8

const (
	kindUnknown kind = iota // not looked at yet
	kindPod                 // one pod is at the other end
	kindBridge              // ports of it lead to pods
	kindOther               // nothing
)

// classify finds out the kind of an interface. A pod's own is a pair of devices whose
// other end is in another network namespace: cilium_host is a veth too, and both its
// ends are the node's. What is not a pod's own may become one: a pair is made before one
// of its ends is moved.
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
	case podKind(link):
		i.kind = kindPod
	default:
		i.kind = kindOther
	}
	return nil
}

// podKind reports whether an interface is one end of a pair, and the other end is in
// another network namespace.
func podKind(link netlink.Link) bool {
	return (link.Type() == "veth" || link.Type() == "netkit") && link.Attrs().NetNsID >= 0 // IFLA_LINK_NETNSID
}
