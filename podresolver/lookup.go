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

// An address that nobody has must not make a node list pods for ever.
const (
	lookupRate    = 1 // a second
	lookupBurst   = 5
	lookupTimeout = 2 * time.Second
)

// lookup asks the API server for the pod of an address, for a watch that is late.
// However many requests wait, it is asked once. What it says is good for the
// requests that wait, and not kept: it may be old by the time it is here, where
// the watch's news come in order.
func (r *Resolver) lookup(ctx context.Context, addr netip.Addr) (*Pod, error) {
	unknown := fmt.Errorf("%w (%s)", ErrUnknownAddress, addr)
	flight := r.lookups.DoChan(addr.String(), func() (any, error) {
		if !r.limit.Allow() {
			return nil, unknown
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
		defer cancel()
		return r.ask(ctx, addr)
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

func (r *Resolver) ask(ctx context.Context, addr netip.Addr) (*Pod, error) {
	r.asked.Add(1)
	list, err := r.pods.ListWithContext(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("status.podIP", addr.String()).String()})
	if err != nil {
		return nil, fmt.Errorf("%w (%s), and the API server cannot be asked: %w", ErrUnknownAddress, addr, err)
	}
	var pods []*Pod
	err = meta.EachListItem(list, func(obj runtime.Object) error {
		pod, ok := obj.(*corev1.Pod)
		if !ok {
			return nil
		}
		if row := r.podRow(pod); row != nil {
			r.tables.mu.Lock()
			pods = append(pods, r.decide(row))
			r.tables.mu.Unlock()
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
	if known := r.Holder(addr); known == nil || known.UID != o.pod.UID {
		r.found.Add(1)
		r.cfg.Logger.Warn("found a pod that the watch has not told of", "pod", o.pod, "address", addr)
	}
	return o.pod, nil
}
