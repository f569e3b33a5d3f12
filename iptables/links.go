package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// podLink is where a pod's packets come from: an interface, and what the route to
// the pod says of it.
type podLink struct {
	index int
	name  string
	// shared: other pods may be behind the interface too, and ARP says which of
	// them has an address. It is a bridge, or the route is to a whole subnet.
	shared bool
	// pinned: no ARP message moves the pod's address to another hardware address.
	pinned bool
}

// errGateway means that a pod's address is reached through another machine or a
// device of the network plugin's: its packets come in on another interface than
// the route's (Cilium), or it has none yet, or no more, and this is the default
// route.
var errGateway = errors.New("is behind a gateway, not on an interface of its own")

// podLinks looks up the interfaces of pods. It is for one survey: what it knows is
// not refreshed.
type podLinks struct {
	byPod      map[netip.Addr]podLinkOrError
	links      map[int]netlink.Link
	neighbours map[int]map[netip.Addr]bool // that are pinned
	addresses  map[int]bool                // interfaces that have an IPv4 address; nil is not known yet
}

type podLinkOrError struct {
	podLink
	err error
}

func newPodLinks() *podLinks {
	return &podLinks{
		byPod:      make(map[netip.Addr]podLinkOrError),
		links:      make(map[int]netlink.Link),
		neighbours: make(map[int]map[netip.Addr]bool),
	}
}

// of returns the link of a pod. Its error completes a sentence that begins with
// the address.
func (l *podLinks) of(pod netip.Addr) (podLink, error) {
	known, ok := l.byPod[pod]
	if !ok {
		known.podLink, known.err = l.lookUp(pod)
		l.byPod[pod] = known
	}
	return known.podLink, known.err
}

func (l *podLinks) lookUp(pod netip.Addr) (podLink, error) {
	// The route as it is written, and not as it is for this one address.
	routes, err := netlink.RouteGetWithOptions(pod.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) == 0 {
		return podLink{}, errors.New("has no route")
	}
	route := routes[0]
	if route.Gw != nil || route.Via != nil || route.LinkIndex == 0 { // the last: several hops
		return podLink{}, errGateway
	}
	link := l.links[route.LinkIndex]
	if link == nil {
		if link, err = netlink.LinkByIndex(route.LinkIndex); err != nil {
			return podLink{}, fmt.Errorf("is on an interface that is gone: %w", err)
		}
		l.links[route.LinkIndex] = link
	}
	found := podLink{index: route.LinkIndex, name: link.Attrs().Name, shared: link.Type() == "bridge"}
	if route.Dst == nil {
		found.shared = true
	} else if ones, bits := route.Dst.Mask.Size(); ones != bits {
		found.shared = true
	}
	if found.shared {
		if found.pinned, err = l.isPinned(found.index, pod); err != nil {
			return podLink{}, fmt.Errorf("is on %s, whose neighbours cannot be listed: %w", found.name, err)
		}
	}
	return found, nil
}

func (l *podLinks) isPinned(index int, pod netip.Addr) (bool, error) {
	pinned := l.neighbours[index]
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
		l.neighbours[index] = pinned
	}
	return pinned[pod], nil
}

// addressed reports whether an interface has an IPv4 address. What cannot be
// listed counts as none.
func (l *podLinks) addressed(index int) bool {
	if l.addresses == nil {
		l.addresses = make(map[int]bool)
		all, _ := netlink.AddrList(nil, netlink.FAMILY_V4)
		for _, a := range all {
			l.addresses[a.LinkIndex] = true
		}
	}
	return l.addresses[index]
}

// reversePathFiltered reports whether the kernel drops what comes in on the
// interface from addresses that it would answer through another: rp_filter is 1,
// where the larger of the interface's and that of "all" counts (ip-sysctl).
func reversePathFiltered(name string) bool {
	highest := ""
	for _, of := range []string{"all", name} {
		b, _ := os.ReadFile("/proc/sys/net/ipv4/conf/" + of + "/rp_filter")
		highest = max(highest, strings.TrimSpace(string(b)))
	}
	return highest == "1"
}
