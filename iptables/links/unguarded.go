package links

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// ErrUnguarded means that another pod may have taken over the address: pods share a link,
// usually a bridge, and the node asks by ARP which of them has the address, and believes
// any reply (CVE-2021-1677).
//
// Azure CNI's bridge mode prevents this: it pins each pod's address to its hardware
// address on the node. A pod with NET_RAW or NET_ADMIN can still take over the hardware
// address itself: the Tracker refuses it once it knows the owner's port, see port.
//
// A pod with an interface of its own is safe: the node replies to where the address is
// routed, whoever sent the packet, so that a forger never completes a TCP handshake.
var ErrUnguarded = errors.New("pods on this link can take each other's addresses")

// Status is the state of the links of all pods.
type Status struct {
	// Unguarded is why addresses on some link cannot be trusted, and what to do; it wraps
	// ErrUnguarded. It is nil with AllowUnguarded.
	Unguarded error
	// Notes are what else an operator may want to know, a sentence each.
	Notes []string
}

// Status returns the last state; it is empty if Config has no Pods.
func (t *Tracker) Status() Status { return *t.status.Load() }

// survey updates the Status. The channel is closed when pods have changed.
func (t *Tracker) survey() (changed <-chan struct{}) {
	pods, changed := t.cfg.Pods()
	unguarded, pinned := SharedLinks(pods)
	var s Status
	if len(pinned) > 0 {
		s.Notes = append(s.Notes, "pods' addresses are pinned to their hardware addresses, but pods with NET_RAW or NET_ADMIN can take those over too, and not every attempt is noticed, on: "+some(pinned))
	}
	if len(unguarded) > 0 && !t.cfg.AllowUnguarded {
		s.Unguarded = fmt.Errorf("no tokens are handed out: %w: %s: nothing there prevents ARP spoofing (CVE-2021-1677): "+
			"use a network plugin that gives each pod its own link, or drop NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet",
			ErrUnguarded, some(unguarded))
	}
	if len(unguarded) > 0 && !slices.Equal(unguarded, t.warned) {
		t.cfg.Logger.Warn("pods can take each other's addresses, and with them identities (CVE-2021-1677)",
			"links", unguarded, "tokens", map[bool]string{true: "handed out nevertheless", false: "withheld"}[t.cfg.AllowUnguarded])
	}
	t.warned = unguarded
	t.status.Store(&s)
	return changed
}

// SharedLinks names the links that these pods share: those with addresses that can be taken
// over, and those with pinned ones.
func SharedLinks(pods []netip.Addr) (unguarded, pinned []string) {
	finder := NewFinder()
	open, pins := map[string]bool{}, map[string]bool{}
	for _, pod := range pods {
		link, err := finder.Find(pod)
		switch {
		case !pod.Is4() || err != nil || !link.Shared:
		case link.Pinned:
			pins[link.Name] = true
		default:
			open[link.Name] = true
		}
	}
	return slices.Sorted(maps.Keys(open)), slices.Sorted(maps.Keys(pins))
}

// some lists the first few names.
func some(names []string) string {
	const few = 5
	if more := len(names) - few; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), more)
	}
	return strings.Join(names, ", ")
}
