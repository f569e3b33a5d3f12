package podresolver

import (
	"fmt"
	"net/netip"

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
	addr        netip.Addr
	pod         *Pod
	terminating bool
}

// claimsOf lists the addresses that a pod holds by its status.
func claimsOf(pod *corev1.Pod, decided *Pod) []claim {
	if pod.Spec.HostNetwork {
		return nil // its address is the node's
	}
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil // its sandbox is gone, and its address free for another
	}
	addrs := make([]claim, 0, 2)
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
		addrs = append(addrs, claim{addr: addr, pod: decided, terminating: pod.DeletionTimestamp != nil})
	}
	add(pod.Status.PodIP)
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	return addrs
}

// newSnapshot settles who owns each address: a pod on its way out yields to one
// that is not; two that both stay make the address nobody's.
func newSnapshot(claims []claim) *snapshot {
	held := make(map[netip.Addr]claim, len(claims))
	s := &snapshot{byAddr: make(map[netip.Addr]owner, len(claims)), replaced: make(chan struct{})}
	for _, c := range claims {
		other, taken := held[c.addr]
		switch {
		case !taken, other.terminating && !c.terminating:
			held[c.addr] = c
			s.byAddr[c.addr] = owner{pod: c.pod}
		case c.terminating && !other.terminating:
		default:
			s.byAddr[c.addr] = owner{err: fmt.Errorf("%w: %s and %s both hold %s", ErrAmbiguousAddress, other.pod, c.pod, c.addr)}
		}
	}
	return s
}
