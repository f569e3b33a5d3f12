package iptables

import (
	"fmt"
	"net/netip"

	"github.com/podidentity/nmi/iptables/links"
)

// Mode is how the kernel hands a pod's connection to the agent.
type Mode string

const (
	// ModeAuto selects whichever of the next two works for the pods of the node:
	// Redirect if every interface that leads to a pod has an IPv4 address, else DNAT.
	ModeAuto Mode = "auto"
	// Redirect sends it to the first IPv4 address of the interface that it came in on,
	// and drops it if the interface has none (nf_nat_redirect_ipv4).
	Redirect Mode = "redirect"
	// DNAT sends it to an address of the agent's own on lo, whatever the interface.
	DNAT Mode = "dnat"
	// EBPF sends it to the same address by programs in the kernel, before there is a packet,
	// and knows the pod by its cgroup. See package ebpf.
	EBPF Mode = "ebpf"
	// None leaves the redirect to another program, such as Cilium with a local redirect
	// policy. A redirect of the agent's own from before stays.
	None Mode = "none"
)

// ParseMode returns the mode of that name.
func ParseMode(name string) (Mode, error) {
	switch m := Mode(name); m {
	case ModeAuto, Redirect, DNAT, EBPF, None:
		return m, nil
	}
	return "", fmt.Errorf("%q is not a redirect mode: use %q, %q, %q, %q or %q", name, ModeAuto, Redirect, DNAT, EBPF, None)
}

// ModeFor returns the mode that works for pods with these addresses, and the reason.
// DNAT works everywhere and is the choice when in doubt. A pod whose address leads to no
// interface is ignored if others' do: its link is being added or removed. Without any
// pod the mode is ModeAuto: unknown.
func ModeFor(pods []netip.Addr) (Mode, string) {
	finder := links.NewFinder()
	known := 0
	var lastErr string
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		link, err := finder.Find(pod)
		if err != nil {
			lastErr = fmt.Sprintf("pod address %s %s", pod, err)
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
	case lastErr != "":
		return DNAT, lastErr
	default:
		return ModeAuto, "no pod's interface is known yet"
	}
}
