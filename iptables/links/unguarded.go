package links

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// ErrUnguarded is the error of a source address that another pod could have taken over:
// pods share a link there, mostly a bridge, and the node learns by ARP which of them has
// the address, that is, it believes any of them (CVE-2021-1677).
//
// Azure CNI's bridge mode pins each pod's address to its hardware address on the node,
// which ends that. It does not end the theft of the hardware address itself, which takes
// a pod with NET_RAW or NET_ADMIN: Tracker refuses it once it has seen which port the
// hardware address belongs to, see port.
//
// A veth of a pod's own has no such trouble. The node answers to where the address is
// routed, whoever sent the packet, so that a forger never completes a TCP handshake.
var ErrUnguarded = errors.New("pods on this link can take each other's addresses")

// Survey looks at all pods' addresses. unguarded names the links on which addresses can
// be taken over; notes are sentences for an operator.
func Survey(pods []netip.Addr, finder *Finder) (unguarded, notes []string) {
	open, pinned := map[string]bool{}, map[string]bool{}
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		link, err := finder.Find(pod)
		if err != nil || !link.Shared {
			continue
		}
		if link.Pinned {
			pinned[link.Name] = true
		} else {
			open[link.Name] = true
		}
	}
	if len(pinned) > 0 {
		notes = append(notes, "pods' addresses are pinned to their hardware addresses, but pods with NET_RAW or NET_ADMIN can take those over too, and not each attempt is noticed, on: "+some(slices.Sorted(maps.Keys(pinned))))
	}
	return slices.Sorted(maps.Keys(open)), notes
}

// UnguardedError says what a survey found and what to do about it; nil if no link is
// unguarded. It wraps ErrUnguarded.
func UnguardedError(links []string) error {
	if len(links) == 0 {
		return nil
	}
	return fmt.Errorf("no tokens are handed out: %w: %s: nothing there stops ARP spoofing (CVE-2021-1677): "+
		"use a network plugin that gives each pod a link of its own, or take NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet",
		ErrUnguarded, some(links))
}

// some lists the first few names.
func some(names []string) string {
	const few = 5
	if more := len(names) - few; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), more)
	}
	return strings.Join(names, ", ")
}
