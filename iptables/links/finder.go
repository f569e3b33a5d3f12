package links

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Link is the interface that the route to a pod leads to.
type Link struct {
	Index int
	Name  string
	// Shared means that other pods may be behind the interface too, and ARP decides which
	// one has an address: it is a bridge, or the route is to a subnet.
	Shared bool
	// Pinned means that the address has a permanent neighbour entry, which ARP does not
	// change.
	Pinned bool
}

// errGateway means that the route to a pod leads to a gateway: its packets come in over
// another interface (Cilium's cilium_host), or the pod's own route does not exist yet, or
// no longer, and this is the default route.
var errGateway = errors.New("is behind a gateway, not on an interface of its own")

// Finder looks up the interfaces that lead to pods. It caches results and never refreshes
// them: use a new one each time.
type Finder struct {
	byPod     map[netip.Addr]linkOrError
	links     map[int]netlink.Link
	pinned    map[int]map[netip.Addr]bool // by interface
	addresses map[int]bool                // interfaces with an IPv4 address; nil until listed
}

type linkOrError struct {
	Link
	err error
}

// NewFinder returns an empty Finder.
func NewFinder() *Finder {
	return &Finder{
		byPod:  make(map[netip.Addr]linkOrError),
		links:  make(map[int]netlink.Link),
		pinned: make(map[int]map[netip.Addr]bool),
	}
}

// Find returns a pod's link. The text of an error follows the pod's address in a sentence.
func (f *Finder) Find(pod netip.Addr) (Link, error) {
	known, ok := f.byPod[pod]
	if !ok {
		known.Link, known.err = f.lookUp(pod)
		f.byPod[pod] = known
	}
	return known.Link, known.err
}

func (f *Finder) lookUp(pod netip.Addr) (Link, error) {
	// FIBMatch: the route as it is in the table, not as resolved for this address.
	routes, err := netlink.RouteGetWithOptions(pod.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) == 0 {
		return Link{}, errors.New("has no route")
	}
	route := routes[0]
	if route.Gw != nil || route.Via != nil || route.LinkIndex == 0 { // the last: several hops
		return Link{}, errGateway
	}
	link := f.links[route.LinkIndex]
	if link == nil {
		if link, err = netlink.LinkByIndex(route.LinkIndex); err != nil {
			return Link{}, fmt.Errorf("is on an interface that is gone: %w", err)
		}
		f.links[route.LinkIndex] = link
	}
	found := Link{Index: route.LinkIndex, Name: link.Attrs().Name, Shared: link.Type() == "bridge"}
	if route.Dst == nil {
		found.Shared = true
	} else if ones, bits := route.Dst.Mask.Size(); ones != bits {
		found.Shared = true
	}
	if found.Shared {
		if found.Pinned, err = f.isPinned(found.Index, pod); err != nil {
			return Link{}, fmt.Errorf("is on %s; listing its neighbours failed: %w", found.Name, err)
		}
	}
	return found, nil
}

func (f *Finder) isPinned(index int, pod netip.Addr) (bool, error) {
	pinned := f.pinned[index]
	if pinned == nil {
		all, err := netlink.NeighList(index, netlink.FAMILY_V4)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return false, err
		}
		pinned = make(map[netip.Addr]bool)
		for _, n := range all {
			if addr, ok := netip.AddrFromSlice(n.IP.To4()); ok && n.State&netlink.NUD_PERMANENT != 0 {
				pinned[addr] = true
			}
		}
		f.pinned[index] = pinned
	}
	return pinned[pod], nil
}

// HasAddress reports whether an interface has an IPv4 address; false if listing the
// addresses fails.
func (f *Finder) HasAddress(index int) bool {
	if f.addresses == nil {
		f.addresses = make(map[int]bool)
		all, _ := netlink.AddrList(nil, netlink.FAMILY_V4)
		for _, a := range all {
			f.addresses[a.LinkIndex] = true
		}
	}
	return f.addresses[index]
}
