package podresolver

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// snapshot answers every lookup until the next one replaces it. It never
// changes once published.
type snapshot struct {
	byAddr map[netip.Addr]owner
	// replaced is closed when a newer snapshot is in place.
	replaced chan struct{}
}

// owner is the pod that holds an address, or the reason why none does.
type owner struct {
	pod *Pod
	err error
}

// resolve returns the pod that holds an address, if it is confirmed to be the caller.
func (s *snapshot) resolve(addr netip.Addr, confirm func(*Pod) error) (*Pod, error) {
	o, ok := s.byAddr[addr]
	switch {
	case !ok:
		return nil, ErrUnknownAddress
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
	switch byAge := b.row.created.Compare(a.row.created); {
	case byAge != 0:
		return byAge
	case a.row.terminating() != b.row.terminating():
		if a.row.terminating() {
			return 1
		}
		return -1
	}
	return cmp.Compare(b.UID, a.UID)
}

// newSnapshot resolves the owner of each address at now. A pod whose grace period has ended
// owns none. Of several pods the youngest is the owner if all others are terminating;
// otherwise the address is ambiguous and has no owner. expires is the next time at which an
// owner changes without an event, zero if none does.
func newSnapshot(pods iter.Seq[*Pod], now time.Time) (_ *snapshot, expires time.Time) {
	claims := make(map[netip.Addr][]*Pod)
	for p := range pods {
		if p.row.expired(now) {
			continue
		}
		if until := p.row.until; p.row.terminating() && (expires.IsZero() || until.Before(expires)) {
			expires = until
		}
		for _, addr := range p.row.claimed() {
			claims[addr] = append(claims[addr], p)
		}
	}
	s := &snapshot{byAddr: make(map[netip.Addr]owner, len(claims)), replaced: make(chan struct{})}
	for addr, by := range claims {
		s.byAddr[addr] = resolveOwner(addr, by)
	}
	return s, expires
}

func resolveOwner(addr netip.Addr, claims []*Pod) owner {
	slices.SortFunc(claims, compareClaims)
	for _, older := range claims[1:] {
		if !older.row.terminating() {
			return owner{err: fmt.Errorf("%w: %s and %s both claim %s", ErrAmbiguousAddress, claims[0], older, addr)}
		}
	}
	return owner{pod: claims[0]}
}
