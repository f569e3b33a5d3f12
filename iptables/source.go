package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// ErrUnguarded is the error of a source address that another pod could have
// taken: pods share a bridge there, and the node finds out by ARP which of them
// has the address, that is, by believing whoever says so (CVE-2021-1677).
//
// Azure CNI's bridge mode pins each pod's address to its hardware address on the
// node, which ends that. It does not end the theft of the hardware address itself,
// which takes a pod with NET_RAW or NET_ADMIN: that is noted, and not refused.
//
// A veth of a pod's own has no such trouble. The node answers to where the
// address is routed, whoever sent the packet, so that a forger never completes a
// TCP handshake.
var ErrUnguarded = errors.New("pods on this bridge can take each other's addresses")

// sources answers whether addresses can be trusted. What it found to be well is
// remembered until the next survey, what is not is looked at again each time.
type sources struct {
	mu      sync.RWMutex // guards trusted
	trusted map[netip.Addr]bool
}

func (s *sources) forget() {
	s.mu.Lock()
	s.trusted = nil
	s.mu.Unlock()
}

// CheckSource returns nil if a connection from this address, which must be that of
// a pod of this node, can only have come from that pod. Its error wraps
// ErrUnguarded, or says why that cannot be told. Config.AllowUnguarded makes it
// always nil.
func (r *Reconciler) CheckSource(pod netip.Addr) error {
	if r.cfg.AllowUnguarded {
		return nil
	}
	s := &r.sources
	s.mu.RLock()
	trusted := s.trusted[pod]
	s.mu.RUnlock()
	if trusted {
		return nil
	}
	if err := checkSource(pod, podLinks{}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trusted == nil {
		s.trusted = make(map[netip.Addr]bool)
	}
	s.trusted[pod] = true
	return nil
}

func checkSource(pod netip.Addr, links podLinks) error {
	link, err := links.of(pod)
	switch {
	case errors.Is(err, errGateway):
		return nil // not one link with other pods; it is the plugin's to guard
	case err != nil:
		return fmt.Errorf("address %s %w", pod, err)
	case link.bridge && !link.pinned[pod]:
		return fmt.Errorf("%w: bridge %s, address %s", ErrUnguarded, link.name, pod)
	}
	return nil
}

// surveySources looks at all pods' addresses. unguarded names the bridges on
// which addresses can be taken; notes are for Status.
func surveySources(pods []netip.Addr, links podLinks) (unguarded, notes []string) {
	var pinned, loose []string
	add := func(to *[]string, name string) {
		if !slices.Contains(*to, name) {
			*to = append(*to, name)
		}
	}
	for _, pod := range pods {
		if !pod.Is4() {
			continue
		}
		link, err := links.of(pod)
		if err != nil {
			continue
		}
		switch {
		case link.bridge && link.pinned[pod]:
			add(&pinned, link.name)
		case link.bridge:
			add(&unguarded, link.name)
		}
		if !link.filtered {
			add(&loose, link.name)
		}
	}
	slices.Sort(unguarded)
	if len(pinned) > 0 {
		notes = append(notes, "pods' addresses are pinned to their hardware addresses, but pods with NET_RAW or NET_ADMIN can take those too, on: "+join(pinned))
	}
	if len(loose) > 0 {
		notes = append(notes, "the kernel does not check source addresses (rp_filter is not 1), though it answers to their owners alone, on: "+join(loose))
	}
	return unguarded, notes
}

// join lists names, of which a node with many pods may have as many.
func join(names []string) string {
	const some = 5
	slices.Sort(names)
	if more := len(names) - some; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:some], ", "), more)
	}
	return strings.Join(names, ", ")
}

// unguardedError says what a survey found and what to do about it; nil if all is
// well.
func unguardedError(bridges []string) error {
	if len(bridges) == 0 {
		return nil
	}
	return fmt.Errorf("no tokens are handed out: %w: %s: nothing there stops ARP spoofing (CVE-2021-1677): "+
		"use a network plugin that gives each pod a link of its own, or take NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet",
		ErrUnguarded, strings.Join(bridges, ", "))
}
