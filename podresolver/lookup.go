package podresolver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
)

// Lookups are rate limited: requests from an address that no pod has must not make a node list
// pods all the time.
const (
	lookupRate    = 1 // a second
	lookupBurst   = 5
	lookupTimeout = 2 * time.Second
	// maxLookedUp is how many of the pods found are remembered, for PodsOf: those of a fetch's time.
	maxLookedUp = 20
)

// lookup asks the API server for the pod that has an address, in case the watch is late.
// Concurrent requests share one call. No other request is decided by the result: unlike the
// events of the watch, it is not ordered, and may be outdated on arrival.
func (r *Resolver) lookup(ctx context.Context, addr netip.Addr) (*Pod, error) {
	flight := r.lookups.DoChan(addr.String(), func() (any, error) {
		if !r.lookupLimit.Allow() {
			return nil, fmt.Errorf("%w (%s)", ErrUnknownAddress, addr)
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
		defer cancel()
		return r.listByAddress(ctx, addr)
	})
	select {
	case result := <-flight:
		if result.Err != nil {
			return nil, result.Err
		}
		return result.Val.(*Pod), nil //nolint:errcheck // see the function above
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (r *Resolver) listByAddress(ctx context.Context, addr netip.Addr) (*Pod, error) {
	r.counts.lookups.Add(1)
	list, err := r.podLister.ListWithContext(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("status.podIP", addr.String()).String()})
	if err != nil {
		r.counts.lookupErrors.Add(1)
		return nil, fmt.Errorf("%w (%s), and the lookup at the API server failed: %w", ErrUnknownAddress, addr, err)
	}
	var pods []*Pod
	err = meta.EachListItem(list, func(obj runtime.Object) error {
		pod, ok := obj.(*corev1.Pod)
		if !ok {
			return nil
		}
		if info := r.trimPod(pod); info != nil {
			r.objects.mu.Lock()
			defer r.objects.mu.Unlock()
			pods = append(pods, r.decideLocked(info))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w (%s): %w", ErrUnknownAddress, addr, err)
	}
	s, _ := newSnapshot(slices.Values(pods), time.Now())
	o, ok := s.byAddr[addr]
	switch {
	case !ok:
		return nil, fmt.Errorf("%w (%s)", ErrUnknownAddress, addr)
	case o.err != nil:
		return nil, o.err
	}
	if known := r.Owner(addr); known == nil || known.UID != o.pod.UID {
		r.counts.lookupHits.Add(1)
		r.cfg.Logger.Warn("the API server knows a pod that the watch has not delivered yet", "pod", o.pod, "address", addr)
		r.objects.rememberLookedUp(o.pod.info)
	}
	return o.pod, nil
}

// rememberLookedUp makes PodsOf return a pod that the watch has not delivered yet.
func (o *objects) rememberLookedUp(info *podInfo) {
	o.mu.Lock()
	defer o.mu.Unlock()
	others := slices.DeleteFunc(o.lookedUp, func(other *podInfo) bool { return other.uid == info.uid })
	o.lookedUp = slices.Insert(others[:min(len(others), maxLookedUp-1)], 0, info)
}
