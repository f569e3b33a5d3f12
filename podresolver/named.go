package podresolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"k8s.io/client-go/tools/cache"
)

// ErrUnknownPod means that no pod of this node is known by the name. One may appear: retry
// shortly.
var ErrUnknownPod = errors.New("no pod on this node has this name")

// NamedIdentity returns the identity that a program on the node gets for a pod of this node, by
// the pod's name, and the address that the pod's own requests come from, by UID if they do; the
// zero one if it has none, or is on the host network. Exceptions are about what a pod sends itself, and do not
// apply here.
//
// An unknown pod is waited for as long as Config.PodWait and ctx allow, then the error is
// ErrUnknownPod, or ErrNotSynced before the first snapshot. An identity that MIC has yet to
// assign is waited for as long as Config.IdentityWait, then the error is ErrNotAssigned.
// Other errors are those of Resolve and (*Pod).Identity.
func (r *Resolver) NamedIdentity(ctx context.Context, namespace, name string, want Selector) (id Identity, addr netip.Addr, err error) {
	pod := cache.NewObjectName(namespace, name)
	podTimeout := time.NewTimer(r.cfg.PodWait)
	defer podTimeout.Stop()
	select {
	case <-r.synced:
	case <-podTimeout.C:
		return Identity{}, netip.Addr{}, r.notSynced()
	case <-ctx.Done():
		return Identity{}, netip.Addr{}, ctx.Err()
	}
	identityTimeout := time.NewTimer(r.cfg.IdentityWait)
	defer identityTimeout.Stop()
	for {
		if r.expired.Load() {
			return Identity{}, netip.Addr{}, ErrStale
		}
		changed := r.current.Load().replaced // before looking at the objects, so that no change is missed
		id, addr, err := r.decideNamed(pod, want, time.Now())
		timeout := podTimeout.C
		switch {
		case errors.Is(err, ErrNotAssigned):
			timeout = identityTimeout.C
		case !errors.Is(err, ErrUnknownPod):
			return id, addr, err
		}
		select {
		case <-changed:
		case <-timeout:
			return Identity{}, netip.Addr{}, err
		case <-ctx.Done():
			return Identity{}, netip.Addr{}, errors.Join(ctx.Err(), err)
		}
	}
}

func (r *Resolver) decideNamed(pod cache.ObjectName, want Selector, now time.Time) (Identity, netip.Addr, error) {
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	info := r.objects.pods[pod]
	if info == nil || info.expired(now) {
		return Identity{}, netip.Addr{}, fmt.Errorf("%w: %s", ErrUnknownPod, pod)
	}
	decided := r.newPod(info)
	r.decideIdentitiesLocked(decided)
	id, err := decided.Identity(want)
	if err != nil {
		err = fmt.Errorf("pod %s: %w", decided, err)
	}
	addr := info.caller
	if addrs := info.claims(); !addr.IsValid() && len(addrs) > 0 { // on the host network they are the node's
		addr = addrs[0]
	}
	return id, addr, err
}
