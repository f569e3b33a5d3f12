package startuptaint

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// watch keeps node up to date until ctx ends.
//
// A watch of one node, by its name, is one idle request and costs the API server a message
// for each of the node's changes: since heartbeats are leases, one in 5 minutes on a quiet
// node. Asking for the node periodically would be a request from each node each time, and
// later. A watch of the metadata alone has no taints.
func (m *Manager) watch(ctx context.Context) {
	client := cache.NewListWatchFromClient(m.client, "nodes", metav1.NamespaceAll, fields.OneTermEqualSelector(metav1.ObjectNameField, m.cfg.Node))
	recording := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := client.ListWithContext(ctx, o)
			m.recordWatch(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			started, err := client.WatchWithContext(ctx, o)
			m.recordWatch(ctx, err)
			return started, err
		},
	}
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(recording, client), &corev1.Node{}, 0, nil)
	// None of these fails before the informer runs. Its own log would repeat an error
	// that recordWatch logs once.
	_ = informer.SetTransform(trim)
	_ = informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {})
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    m.observe,
		UpdateFunc: func(_, node any) { m.observe(node) },
		DeleteFunc: func(any) { m.setNode(nil) },
	})
	informer.RunWithContext(ctx)
}

func (m *Manager) observe(obj any) {
	if node, ok := obj.(*corev1.Node); ok {
		m.setNode(node)
	}
}

// recordWatch records the outcome of a list or of the start of a watch. Some errors are
// normal: a reflector tries WatchList, then an old resource version, then none.
func (m *Manager) recordWatch(ctx context.Context, err error) {
	if ctx.Err() != nil || apierrors.IsInvalid(err) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsTimeout(err) {
		return
	}
	m.setError(&m.watchErr, err)
}

// trim keeps of a node what this package needs: images and conditions are most of it.
func trim(obj any) (any, error) {
	node, ok := obj.(*corev1.Node)
	if !ok {
		return obj, nil
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion},
		Spec:       corev1.NodeSpec{Taints: node.Spec.Taints},
	}, nil
}
