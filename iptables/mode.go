package iptables

import (
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/iptables/links"
)

// Mode is how the kernel hands a pod's connection to the agent.
type Mode string

const (
	// AutoMode is whichever of the next two works for the pods of the node:
	// Redirect when every interface that leads to one has an IPv4 address, else
	// DNAT.
	AutoMode Mode = "auto"
	// Redirect sends it to the first IPv4 address of the interface that it came
	// in on, and drops it if there is none (nf_nat_redirect_ipv4).
	Redirect Mode = "redirect"
	// DNAT sends it to an address of our own on lo, whatever the interface.
	DNAT Mode = "dnat"
	// None leaves the redirect to somebody else, such as a local redirect policy
	// of Cilium. Rules of ours that are there stay.
	None Mode = "none"
)

// ParseMode returns the mode of that name.
func ParseMode(name string) (Mode, error) {
	switch m := Mode(name); m {
	case AutoMode, Redirect, DNAT, None:
		return m, nil
	}
	return "", fmt.Errorf("%q is not a redirect mode: use %q, %q, %q or %q", name, AutoMode, Redirect, DNAT, None)
}

// choose picks the mode that works for pods with these addresses, and says why.
// DNAT works everywhere, so it is the answer to every doubt. A pod whose address
// leads to no interface is none as long as others do: its link is about to come, or
// has gone. Where none does, the answer is AutoMode: it cannot be told yet.
func choose(pods []netip.Addr) (Mode, string) {
	finder := links.NewFinder()
	known := 0
	var doubt string
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		link, err := finder.Find(pod)
		if err != nil {
			doubt = fmt.Sprintf("pod address %s %s", pod, err)
			continue
		}
		if !finder.HasAddress(link.Index) {
			return DNAT, fmt.Sprintf("interface %s, which leads to pod address %s, has no IPv4 address", link.Name, pod)
		}
		known++
	}
	switch {
	case known > 0:
		return Redirect, "every interface that leads to a pod has an IPv4 address"
	case doubt != "":
		return DNAT, doubt
	default:
		return AutoMode, "no pod's interface is known yet"
	}
}
