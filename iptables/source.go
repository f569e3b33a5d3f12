package iptables

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrUnguarded is the error of a source address that another pod could have
// taken: pods share a link there, a bridge mostly, and the node finds out by ARP
// which of them has the address, that is, by believing whoever says so
// (CVE-2021-1677).
//
// Azure CNI's bridge mode pins each pod's address to its hardware address on the
// node, which ends that. It does not end the theft of the hardware address itself,
// which takes a pod with NET_RAW or NET_ADMIN: that is noted, and not refused.
//
// A veth of a pod's own has no such trouble. The node answers to where the
// address is routed, whoever sent the packet, so that a forger never completes a
// TCP handshake.
var ErrUnguarded = errors.New("pods on this link can take each other's addresses")

// How long it is remembered whether an address can be trusted. Nothing announces
// all that bears on it.
const (
	trustFor    = 5 * time.Second
	distrustFor = time.Second
	maxVerdicts = 4096 // many times the pods that a node can have
)

// verdicts are what was found of addresses.
type verdicts struct {
	mu     sync.RWMutex // guards byAddr
	byAddr map[netip.Addr]verdict
}

type verdict struct {
	err   error
	until time.Time
}

// CheckSource returns nil if a connection from this address, which must be that of
// a pod of this node, can only have come from that pod. Its error wraps
// ErrUnguarded, or says why that cannot be told. Config.AllowUnguarded makes it
// always nil.
func (r *Reconciler) CheckSource(pod netip.Addr) error {
	if r.cfg.AllowUnguarded {
		return nil
	}
	v := &r.verdicts
	now := time.Now()
	v.mu.RLock()
	known, ok := v.byAddr[pod]
	v.mu.RUnlock()
	if ok && now.Before(known.until) {
		return known.err
	}
	found := verdict{err: checkSource(pod, newPodLinks()), until: now.Add(trustFor)}
	if found.err != nil {
		found.until = now.Add(distrustFor)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.byAddr == nil || len(v.byAddr) >= maxVerdicts {
		v.byAddr = make(map[netip.Addr]verdict)
	}
	v.byAddr[pod] = found
	return found.err
}

func checkSource(pod netip.Addr, links *podLinks) error {
	link, err := links.of(pod)
	switch {
	case errors.Is(err, errGateway):
		return nil // not on one link with other pods; it is the plugin's to guard
	case err != nil:
		return fmt.Errorf("address %s %w", pod, err)
	case link.shared && !link.pinned:
		return fmt.Errorf("%w: %s, address %s", ErrUnguarded, link.name, pod)
	}
	return nil
}

// surveySources looks at all pods' addresses. unguarded names the links on which
// addresses can be taken; notes are for Status.
func surveySources(pods []netip.Addr, links *podLinks) (unguarded, notes []string) {
	open, pinned, all := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		link, err := links.of(pod)
		if err != nil {
			continue
		}
		all[link.name] = true
		if link.shared {
			open[link.name] = open[link.name] || !link.pinned
			pinned[link.name] = pinned[link.name] || link.pinned
		}
	}
	names := func(set map[string]bool) []string {
		maps.DeleteFunc(set, func(_ string, in bool) bool { return !in })
		return slices.Sorted(maps.Keys(set))
	}
	if pinned := names(pinned); len(pinned) > 0 {
		notes = append(notes, "pods' addresses are pinned to their hardware addresses, but pods with NET_RAW or NET_ADMIN can take those too, on: "+some(pinned))
	}
	for name := range all {
		all[name] = !reversePathFiltered(name)
	}
	if loose := names(all); len(loose) > 0 {
		notes = append(notes, "the kernel does not check source addresses (rp_filter is not 1), though it answers to their owners alone, on: "+some(loose))
	}
	return names(open), notes
}

// some lists names, of which a node with many pods may have as many.
func some(names []string) string {
	const few = 5
	if more := len(names) - few; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), more)
	}
	return strings.Join(names, ", ")
}

// unguardedError says what a survey found and what to do about it; nil if all is
// well.
func unguardedError(links []string) error {
	if len(links) == 0 {
		return nil
	}
	return fmt.Errorf("no tokens are handed out: %w: %s: nothing there stops ARP spoofing (CVE-2021-1677): "+
		"use a network plugin that gives each pod a link of its own, or take NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet",
		ErrUnguarded, some(links))
}
