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
)

// lookup asks the API server for the pod that has an address, in case the watch is late.
// Concurrent requests share one call. The result is not stored: unlike the events of the
// watch, it is not ordered, and may be outdated on arrival.
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
	}
	return o.pod, nil
}
