package podresolver

import (
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// snapshot answers every lookup until the next one replaces it. It never
// changes once published.
type snapshot struct {
	byAddr map[netip.Addr]owner
	// replaced is closed when a newer snapshot is in place; who waits for an
	// address waits on it.
	replaced chan struct{}
}

// owner is the pod that holds an address, or the reason why none does.
type owner struct {
	pod *Pod
	err error
}

// claim is a pod that holds an address, as far as its own object says.
type claim struct {
	addr netip.Addr
	pod  *Pod
	// until is the end of a terminating pod's grace (its deletionTimestamp has the
	// grace in it); zero for one that stays. Past it the address may be given to
	// another pod, whose status says so only later, while a finalizer keeps the
	// old object.
	until time.Time
}

func (c claim) terminating() bool { return !c.until.IsZero() }

// claimsOf lists the addresses that a pod holds by its status.
func claimsOf(pod *corev1.Pod, decided *Pod) []claim {
	if pod.Spec.HostNetwork {
		return nil // its address is the node's
	}
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil // its sandbox is gone, and its address free for another
	}
	addrs := make([]claim, 0, 2)
	var until time.Time
	if pod.DeletionTimestamp != nil {
		until = pod.DeletionTimestamp.Time
	}
	add := func(text string) {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return // not assigned yet
		}
		addr = addr.Unmap()
		for _, c := range addrs {
			if c.addr == addr {
				return
			}
		}
		addrs = append(addrs, claim{addr: addr, pod: decided, until: until})
	}
	add(pod.Status.PodIP)
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	return addrs
}

// newSnapshot settles who owns each address at now: a pod on its way out yields to
// one that is not, and to all when its grace has ended; two that both stay make
// the address nobody's. It returns when that changes by time alone, zero if never.
func newSnapshot(claims []claim, now time.Time) (_ *snapshot, expires time.Time) {
	held := make(map[netip.Addr]claim, len(claims))
	s := &snapshot{byAddr: make(map[netip.Addr]owner, len(claims)), replaced: make(chan struct{})}
	for _, c := range claims {
		if c.terminating() {
			if !c.until.After(now) {
				continue
			}
			if expires.IsZero() || c.until.Before(expires) {
				expires = c.until
			}
		}
		other, taken := held[c.addr]
		switch {
		case !taken, other.terminating() && !c.terminating():
			held[c.addr] = c
			s.byAddr[c.addr] = owner{pod: c.pod}
		case c.terminating() && !other.terminating():
		default:
			s.byAddr[c.addr] = owner{err: fmt.Errorf("%w: %s and %s both hold %s", ErrAmbiguousAddress, other.pod, c.pod, c.addr)}
		}
	}
	return s, expires
}
