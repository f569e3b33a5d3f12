package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// podLink is the interface that a pod's packets come in on.
type podLink struct {
	index     int
	name      string
	bridge    bool
	addressed bool // it has an IPv4 address
	filtered  bool // the kernel drops packets that would not be answered through it
	// pinned are the neighbours whose hardware address was set by hand; on
	// bridges only.
	pinned map[netip.Addr]bool
}

// errGateway means that a pod's address is reached through another machine or a
// device of the network plugin's: its packets come in on another interface than
// the route's (Cilium), or it has none yet and this is the default route.
var errGateway = errors.New("is behind a gateway, not on an interface of its own")

// podLinks looks up the interfaces of pods, each once. It is for one survey:
// what it knows is not refreshed.
type podLinks map[int]*podLink

// of returns the interface of a pod. Its error completes a sentence that begins
// with the address.
func (l podLinks) of(pod netip.Addr) (*podLink, error) {
	routes, err := netlink.RouteGet(pod.AsSlice())
	if err != nil || len(routes) == 0 {
		return nil, errors.New("has no route")
	}
	if routes[0].Gw != nil {
		return nil, errGateway
	}
	index := routes[0].LinkIndex
	if known := l[index]; known != nil {
		return known, nil
	}
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil, fmt.Errorf("is on an interface that is gone: %w", err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	found := &podLink{
		index: index, name: link.Attrs().Name, bridge: link.Type() == "bridge",
		addressed: err == nil && len(addrs) > 0,
	}
	found.filtered = reversePathFiltered(found.name)
	if found.bridge {
		if found.pinned, err = pinnedNeighbours(index); err != nil {
			return nil, fmt.Errorf("is on %s, whose neighbours cannot be listed: %w", found.name, err)
		}
	}
	l[index] = found
	return found, nil
}

// pinnedNeighbours lists the addresses on a link that no ARP message moves to
// another hardware address.
func pinnedNeighbours(index int) (map[netip.Addr]bool, error) {
	all, err := netlink.NeighList(index, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	pinned := make(map[netip.Addr]bool)
	for _, n := range all {
		if addr, ok := netip.AddrFromSlice(n.IP.To4()); ok && n.State&netlink.NUD_PERMANENT != 0 {
			pinned[addr] = true
		}
	}
	return pinned, nil
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
