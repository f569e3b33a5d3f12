package podresolver

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// snapshot is the owner of each address at one time. It does not change once published.
type snapshot struct {
	byAddr map[netip.Addr]owner
	// hostNetwork is for HostNetworkPods; each UID once.
	hostNetwork struct{ bound, unbound []string }
	// complete is whether all resources have been listed.
	complete bool
	// replaced is closed when a newer snapshot is in place.
	replaced chan struct{}
}

// owner is the pod that an address belongs to, or ErrAmbiguousAddress.
type owner struct {
	pod *Pod
	err error
}

// resolve returns the owner of an address if confirm accepts it.
func (s *snapshot) resolve(addr netip.Addr, confirm func(*Pod) error) (*Pod, error) {
	o, ok := s.byAddr[addr]
	switch {
	case !ok:
		return nil, unknown(addr)
	case o.err != nil:
		return nil, o.err
	}
	if err := confirm(o.pod); err != nil {
		return nil, err
	}
	return o.pod, nil
}

// compareClaims orders the pods that claim one address, youngest first. Creation times are
// in whole seconds: of two pods created in the same second, a terminating one counts as the
// older, then the UID decides.
func compareClaims(a, b *Pod) int {
	switch byAge := b.info.created.Compare(a.info.created); {
	case byAge != 0:
		return byAge
	case a.info.terminating() != b.info.terminating():
		if a.info.terminating() {
			return 1
		}
		return -1
	}
	return cmp.Compare(b.UID, a.UID)
}

// newSnapshot resolves the owner of each address at now. A pod whose grace period has ended
// owns none. Of several pods the youngest is the owner if all others are terminating;
// otherwise the address is ambiguous and has no owner. A pod owns its UID in whatever state it is. expires is the next time at which an
// owner changes without an event, zero if none does.
func newSnapshot(pods iter.Seq[*Pod], now time.Time) (_ *snapshot, expires time.Time) {
	s := &snapshot{replaced: make(chan struct{})}
	claims := make(map[netip.Addr][]*Pod)
	for p := range pods {
		if caller := p.info.caller; caller.IsValid() {
			claims[caller] = append(claims[caller], p)
			s.addHostNetwork(p)
		}
		if p.info.expired(now) {
			continue
		}
		if until := p.info.until; p.info.terminating() && (expires.IsZero() || until.Before(expires)) {
			expires = until
		}
		for _, addr := range p.info.claims() {
			claims[addr] = append(claims[addr], p)
		}
	}
	s.sortHostNetwork()
	s.byAddr = make(map[netip.Addr]owner, len(claims))
	for addr, by := range claims {
		s.byAddr[addr] = resolveOwner(addr, by)
	}
	return s, expires
}

// addHostNetwork adds a pod to hostNetwork if it is on the host network and may run.
func (s *snapshot) addHostNetwork(p *Pod) {
	switch h := &s.hostNetwork; {
	case !p.info.hostNetwork || p.info.finished:
	case p.bound():
		h.bound = append(h.bound, UIDOf(p.info.caller))
	default:
		h.unbound = append(h.unbound, UIDOf(p.info.caller))
	}
}

// sortHostNetwork makes each UID of hostNetwork one of bound or of unbound.
func (s *snapshot) sortHostNetwork() {
	h := &s.hostNetwork
	slices.Sort(h.bound)
	h.bound = slices.Compact(h.bound)
	slices.Sort(h.unbound)
	h.unbound = slices.DeleteFunc(slices.Compact(h.unbound), func(uid string) bool {
		_, bound := slices.BinarySearch(h.bound, uid)
		return bound
	})
}

func resolveOwner(addr netip.Addr, claims []*Pod) owner {
	slices.SortFunc(claims, compareClaims)
	for _, older := range claims[1:] {
		if !older.info.terminating() {
			return owner{err: &ambiguousError{addr, claims}}
		}
	}
	return owner{pod: claims[0]}
}

// ambiguousError is ErrAmbiguousAddress, with the pods, youngest first.
type ambiguousError struct {
	addr   netip.Addr
	claims []*Pod
}

func (e *ambiguousError) Error() string {
	var names []string
	for _, p := range e.claims {
		if (!p.info.terminating() || p == e.claims[0]) && len(names) < maxDescribed {
			names = append(names, p.String())
		}
	}
	return fmt.Sprintf("%s (%s): %s", ErrAmbiguousAddress, describe(e.addr), strings.Join(names, " and "))
}

// Unwrap returns ErrAmbiguousAddress.
func (e *ambiguousError) Unwrap() error { return ErrAmbiguousAddress }

// Claimants returns the pods that claim the address of an error that wraps ErrAmbiguousAddress;
// nil for other errors.
func Claimants(err error) []*Pod {
	var ambiguous *ambiguousError
	if !errors.As(err, &ambiguous) {
		return nil
	}
	return ambiguous.claims
}
