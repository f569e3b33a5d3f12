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

// Status is what the Tracker last found of the links to all pods.
type Status struct {
	// Unguarded is why no address on some link can be trusted, and what to do; it wraps
	// ErrUnguarded. It is nil with AllowUnguarded.
	Unguarded error
	// Notes are what else somebody may want to know, a sentence each.
	Notes []string
}

// Status returns what was last found; nothing if Config has no Pods.
func (t *Tracker) Status() Status { return *t.status.Load() }

// survey looks at the links of all pods. The channel says when their addresses have
// changed.
func (t *Tracker) survey() (changed <-chan struct{}) {
	pods, changed := t.cfg.Pods()
	unguarded, pinned := sharedLinks(pods)
	var s Status
	if len(pinned) > 0 {
		s.Notes = append(s.Notes, "pods' addresses are pinned to their hardware addresses, but pods with NET_RAW or NET_ADMIN can take those over too, and not each attempt is noticed, on: "+some(pinned))
	}
	if len(unguarded) > 0 && !t.cfg.AllowUnguarded {
		s.Unguarded = fmt.Errorf("no tokens are handed out: %w: %s: nothing there stops ARP spoofing (CVE-2021-1677): "+
			"use a network plugin that gives each pod a link of its own, or take NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet",
			ErrUnguarded, some(unguarded))
	}
	if len(unguarded) > 0 && !slices.Equal(unguarded, t.warned) {
		t.cfg.Logger.Warn("pods can take each other's addresses, and with them identities (CVE-2021-1677)",
			"links", unguarded, "tokens", map[bool]string{true: "handed out all the same", false: "withheld"}[t.cfg.AllowUnguarded])
	}
	t.warned = unguarded
	t.status.Store(&s)
	return changed
}

// sharedLinks names the links that pods share, and of these the ones on which an
// address can be taken over and those on which some are pinned.
func sharedLinks(pods []netip.Addr) (unguarded, pinned []string) {
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
