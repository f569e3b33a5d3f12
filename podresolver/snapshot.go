package podresolver

import (
	"cmp"
	"fmt"
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

// claim is a pod that holds an address, as far as its own object says.
type claim struct {
	addr    netip.Addr
	pod     *Pod
	created time.Time
	// until is the end of a terminating pod's grace (its deletionTimestamp has the
	// grace in it); zero for one that stays. Past it the address may be given to
	// another pod, whose status says so only later, while a finalizer keeps the
	// old object.
	until time.Time
}

func (c claim) terminating() bool { return !c.until.IsZero() }

// younger orders claims by age. Creation is stored in seconds: of two that are as
// old as each other the terminating one counts as the elder, then the UID decides.
func younger(a, b claim) int {
	switch byAge := b.created.Compare(a.created); {
	case byAge != 0:
		return byAge
	case a.terminating() != b.terminating():
		if a.terminating() {
			return 1
		}
		return -1
	}
	return cmp.Compare(b.pod.UID, a.pod.UID)
}

// newSnapshot settles who owns each address at now. A pod whose grace has ended
// owns none. Of several the youngest does if all others are terminating; else the
// address is nobody's, since one of them must be wrong. It returns when that
// changes by time alone, zero if never.
func newSnapshot(claims []claim, now time.Time) (_ *snapshot, expires time.Time) {
	held := make(map[netip.Addr][]claim, len(claims))
	for _, c := range claims {
		if c.terminating() {
			if !c.until.After(now) {
				continue
			}
			if expires.IsZero() || c.until.Before(expires) {
				expires = c.until
			}
		}
		held[c.addr] = append(held[c.addr], c)
	}
	s := &snapshot{byAddr: make(map[netip.Addr]owner, len(held)), replaced: make(chan struct{})}
	for addr, by := range held {
		s.byAddr[addr] = settle(addr, by)
	}
	return s, expires
}

func settle(addr netip.Addr, by []claim) owner {
	slices.SortFunc(by, younger)
	for _, elder := range by[1:] {
		if !elder.terminating() {
			return owner{err: fmt.Errorf("%w: %s and %s both hold %s", ErrAmbiguousAddress, by[0].pod, elder.pod, addr)}
		}
	}
	return owner{pod: by[0].pod}
}

// claimsOf lists the addresses that a pod holds.
func claimsOf(row *podRow, decided *Pod) []claim {
	if row.void != "" {
		return nil // they are another's, or the node's
	}
	claims := make([]claim, len(row.addrs))
	for i, addr := range row.addrs {
		claims[i] = claim{addr: addr, pod: decided, created: row.created, until: row.until}
	}
	return claims
}
