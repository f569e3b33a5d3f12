package podresolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// source is one resource kept up to date by an informer, trimmed to what a
// decision needs.
type source struct {
	name     string // as in a path of the API server
	log      *slog.Logger
	informer cache.SharedIndexInformer
	handler  cache.ResourceEventHandlerRegistration

	mu      sync.Mutex // guards lastErr
	lastErr error      // of the list or watch that failed last; nil when the last one did not
}

// lister is what the typed and the dynamic clients have in common.
type lister[L runtime.Object] interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// newSource returns a source of everything that the lister lists under the field
// selector. It stores what trim returns and tells changed which namespace an
// event was in.
func newSource[L runtime.Object](name string, l lister[L], client any, example runtime.Object, selector string,
	trim func(any) any, changed func(namespace string), log *slog.Logger,
) (*source, error) {
	s := &source{name: name, log: log}
	calls := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (list runtime.Object, err error) {
			o.FieldSelector = selector
			err = s.persist(ctx, func() error { list, err = l.List(ctx, o); return err })
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (w watch.Interface, err error) {
			o.FieldSelector = selector
			err = s.persist(ctx, func() error { w, err = l.Watch(ctx, o); return err })
			return w, err
		},
	}
	s.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(calls, client), example, 0,
		cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	if err := s.informer.SetTransform(func(obj any) (any, error) { return trim(obj), nil }); err != nil {
		return nil, err
	}
	mark := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if o, err := meta.Accessor(obj); err == nil {
			changed(o.GetNamespace())
		}
	}
	var err error
	s.handler, err = s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    mark,
		UpdateFunc: func(_, obj any) { mark(obj) },
		DeleteFunc: mark,
	})
	return s, err
}

// podSource is the pods of one node.
func podSource(client kubernetes.Interface, node string, changed func(string), log *slog.Logger) (*source, error) {
	return newSource("pods", client.CoreV1().Pods(metav1.NamespaceAll), client, &corev1.Pod{},
		fields.OneTermEqualSelector("spec.nodeName", node).String(), trimPod, changed, log)
}

// customSource is a custom resource of the whole cluster.
func customSource(client dynamic.Interface, resource schema.GroupVersionResource, trim func(any) any, changed func(string), log *slog.Logger) (*source, error) {
	return newSource(resource.GroupResource().String(), client.Resource(resource), client, &unstructured.Unstructured{},
		"", trim, changed, log)
}

// Between two tries; the longest is short enough for a person who has just
// mended something, and long enough for an API server that a thousand nodes
// come back to.
const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 15 * time.Second
)

// persist repeats a call to the API server until it succeeds, ctx ends, or the
// error is one that the informer itself must see. An informer left to repeat the
// call would say nothing of a server that refuses connections, wait for up to a
// minute, and not be stopped meanwhile (client-go v0.37, Reflector.watchList).
func (s *source) persist(ctx context.Context, call func() error) error {
	delay := firstRetry
	for {
		err := call()
		switch {
		case ctx.Err() != nil:
			return err
		case err == nil:
			s.succeeded()
			return nil
		case apierrors.IsInvalid(err), apierrors.IsResourceExpired(err), apierrors.IsGone(err), apierrors.IsTimeout(err):
			return err // streaming is not supported, or the resource version is too old or too new
		}
		s.failed(err)
		select {
		case <-time.After(wait.Jitter(delay, 0.5)):
		case <-ctx.Done():
			return ctx.Err()
		}
		delay = min(2*delay, lastRetry)
	}
}

// failed notes an error. The log gets each once, not once a try.
func (s *source) failed(err error) {
	err = advise(s.name, err)
	s.mu.Lock()
	news := s.lastErr == nil || s.lastErr.Error() != err.Error()
	s.lastErr = err
	s.mu.Unlock()
	if news {
		s.log.Warn("cannot watch the API server; trying again", "error", err)
	}
}

func (s *source) succeeded() {
	s.mu.Lock()
	before := s.lastErr
	s.lastErr = nil
	s.mu.Unlock()
	if before != nil {
		s.log.Info("watching the API server again", "resource", s.name)
	}
}

// advise adds what to do to errors that somebody has to act on.
func advise(name string, err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: the API server does not know this resource: apply the custom resource definitions (deploy/manifests/crds.yaml)", name)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: the agent's service account may not list and watch this resource: apply its role (deploy/manifests/rbac.yaml): %w", name, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: the API server does not accept the agent's credentials: check KUBECONFIG or the service account's token: %w", name, err)
	}
	var call *url.Error // its URL is long, and different for each try
	if errors.As(err, &call) {
		return fmt.Errorf("%s: cannot reach the API server (is it up, and its address right?): %w", name, call.Err)
	}
	return fmt.Errorf("%s: the API server answered: %w", name, err)
}

// pending says why the source has not synced yet; nil once it has.
func (s *source) pending() error {
	if s.informer.HasSynced() {
		return nil
	}
	if err := s.trouble(); err != nil {
		return err
	}
	return fmt.Errorf("%s: waiting for the first list", s.name)
}

// trouble is what keeps the source from being up to date; nil if nothing does.
func (s *source) trouble() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lastErr
}

// The trim functions keep what a decision needs, so that memory does not grow
// with what people write into annotations. They leave alone what they do not
// know: informers pass tombstones through them, and objects trimmed before.

func trimPod(obj any) any {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:         pod.Namespace,
			Name:              pod.Name,
			UID:               pod.UID,
			ResourceVersion:   pod.ResourceVersion,
			Labels:            pod.Labels,
			DeletionTimestamp: pod.DeletionTimestamp,
		},
		Spec: corev1.PodSpec{NodeName: pod.Spec.NodeName, HostNetwork: pod.Spec.HostNetwork},
		Status: corev1.PodStatus{
			Phase:  pod.Status.Phase,
			PodIP:  pod.Status.PodIP,
			PodIPs: pod.Status.PodIPs,
		},
	}
}

func trimMeta(u *unstructured.Unstructured) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace:         u.GetNamespace(),
		Name:              u.GetName(),
		UID:               u.GetUID(),
		ResourceVersion:   u.GetResourceVersion(),
		CreationTimestamp: u.GetCreationTimestamp(),
	}
}

// trimSpec reads an object's spec into one of the types. An object that does not
// fit its type (stored before the definitions had a schema) gets an empty spec,
// which matches and grants nothing; it must not stop the others from being read.
func trimSpec[Spec any](u *unstructured.Unstructured) Spec {
	var spec, none Spec
	in, ok := u.Object["spec"].(map[string]any)
	if !ok {
		return none
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(in, &spec); err != nil {
		slog.Warn("ignoring an object whose spec does not fit its type",
			"kind", u.GetKind(), "namespace", u.GetNamespace(), "name", u.GetName(), "error", err)
		return none
	}
	return spec
}

func trimIdentity(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj
	}
	spec := trimSpec[aadpodidentity.AzureIdentitySpec](u)
	return &aadpodidentity.AzureIdentity{
		ObjectMeta: trimMeta(u),
		Spec:       aadpodidentity.AzureIdentitySpec{Type: spec.Type, ClientID: spec.ClientID, ResourceID: spec.ResourceID},
	}
}

func trimBinding(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj
	}
	return &aadpodidentity.AzureIdentityBinding{ObjectMeta: trimMeta(u), Spec: trimSpec[aadpodidentity.AzureIdentityBindingSpec](u)}
}

func trimException(obj any) any {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj
	}
	return &aadpodidentity.AzurePodIdentityException{ObjectMeta: trimMeta(u), Spec: trimSpec[aadpodidentity.AzurePodIdentityExceptionSpec](u)}
}
