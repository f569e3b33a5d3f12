package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// Mode is how the kernel hands a pod's connection to the agent.
type Mode string

const (
	// AutoMode is whichever of the two works for the pods of the node: Redirect
	// when every interface that leads to one has an IPv4 address, else DNAT.
	AutoMode Mode = "auto"
	// Redirect sends it to the first IPv4 address of the interface that it came
	// in on, and drops it if there is none (nf_nat_redirect_ipv4).
	Redirect Mode = "redirect"
	// DNAT sends it to an address of our own on lo, whatever the interface.
	DNAT Mode = "dnat"
)

// Modes lists the values that ParseMode takes.
var Modes = []Mode{AutoMode, Redirect, DNAT}

// ParseMode returns the mode of that name.
func ParseMode(name string) (Mode, error) {
	if m := Mode(name); slices.Contains(Modes, m) {
		return m, nil
	}
	return "", fmt.Errorf("%q is not a redirect mode: use %q, %q or %q", name, AutoMode, Redirect, DNAT)
}

// choose picks the mode that works for pods with these addresses, and says why.
// DNAT works everywhere, so it is the answer to every doubt.
func choose(pods []netip.Addr) (Mode, string) {
	addressed := make(map[int]bool) // by link
	var last string
	known := 0
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		routes, err := netlink.RouteGet(pod.AsSlice())
		if err != nil || len(routes) == 0 {
			return DNAT, fmt.Sprintf("there is no route to pod address %s", pod)
		}
		if routes[0].Gw != nil {
			// Its packets come in on another interface than the route's (Cilium),
			// or it has none yet, and this is the default route.
			return DNAT, fmt.Sprintf("pod address %s is behind a gateway, not on an interface of its own", pod)
		}
		index := routes[0].LinkIndex
		has, seen := addressed[index]
		if !seen {
			link, err := netlink.LinkByIndex(index)
			if err != nil {
				return DNAT, fmt.Sprintf("the interface of pod address %s is gone", pod)
			}
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
			last, has = link.Attrs().Name, err == nil && len(addrs) > 0
			addressed[index] = has
		}
		if !has {
			return DNAT, fmt.Sprintf("interface %s, which leads to pod address %s, has no IPv4 address", last, pod)
		}
		known++
	}
	if known == 0 {
		return DNAT, "no pod's interface is known yet"
	}
	return Redirect, "every interface that leads to a pod has an IPv4 address"
}
