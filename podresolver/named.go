package podresolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"k8s.io/client-go/tools/cache"
)

// ErrUnknownPod means that no pod of this node is known by the name. It may be about to
// appear: ask again shortly.
var ErrUnknownPod = errors.New("no pod of this node is known by this name")

// NamedIdentity decides which identity a pod of this node gets, by the pod's name: for
// a program of the node that acts for it, before the pod has an address or instead of it.
// An exception is about what the pod sends itself, and changes nothing here.
//
// A pod that is not known is waited for as long as Config.PodWait and ctx allow, then it
// is ErrUnknownPod, or ErrNotSynced where no pod can be known yet; an identity that MIC has yet to assign as long as
// Config.IdentityWait, then it is ErrNotAssigned. Errors are otherwise those of Resolve
// and (*Pod).Identity.
//
// addr is the address that the pod holds, which its own requests come from; the zero one if
// it has none yet.
func (r *Resolver) NamedIdentity(ctx context.Context, namespace, name string, want Selector) (id Identity, addr netip.Addr, err error) {
	pod := cache.NewObjectName(namespace, name)
	known := time.NewTimer(r.cfg.PodWait)
	defer known.Stop()
	select {
	case <-r.synced:
	case <-known.C:
		return Identity{}, netip.Addr{}, r.notSynced()
	case <-ctx.Done():
		return Identity{}, netip.Addr{}, ctx.Err()
	}
	assigned := time.NewTimer(r.cfg.IdentityWait)
	defer assigned.Stop()
	for {
		if r.expired.Load() {
			return Identity{}, netip.Addr{}, ErrStale
		}
		changed := r.current.Load().replaced // before the tables are looked at, so that no change is missed
		id, addr, err := r.named(pod, want, time.Now())
		patience := known.C
		switch {
		case errors.Is(err, ErrNotAssigned):
			patience = assigned.C
		case !errors.Is(err, ErrUnknownPod):
			return id, addr, err
		}
		select {
		case <-changed:
		case <-patience:
			return Identity{}, netip.Addr{}, err
		case <-ctx.Done():
			return Identity{}, netip.Addr{}, errors.Join(ctx.Err(), err)
		}
	}
}

func (r *Resolver) named(pod cache.ObjectName, want Selector, now time.Time) (Identity, netip.Addr, error) {
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	row := r.tables.pods[pod]
	if row == nil || row.expired(now) {
		return Identity{}, netip.Addr{}, fmt.Errorf("%w: %s", ErrUnknownPod, pod)
	}
	decided := r.newPod(row)
	r.decideIdentities(decided)
	id, err := decided.Identity(want)
	if err != nil {
		err = fmt.Errorf("pod %s: %w", decided, err)
	}
	var addr netip.Addr
	if addrs := row.claimed(); len(addrs) > 0 { // on the host network it is the node's
		addr = addrs[0]
	}
	return id, addr, err
}
