package podresolver

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// source is one resource kept up to date by an informer, trimmed to what a
// decision needs.
type source struct {
	name     string // as in a path of the API server
	informer cache.SharedIndexInformer
	handler  cache.ResourceEventHandlerRegistration
	trim     func(any) any

	mu      sync.Mutex // guards lastErr
	lastErr error      // of the list or watch that failed last
}

var byNamespace = cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}

// podSource is the pods of one node.
func podSource(client kubernetes.Interface, node string) *source {
	return &source{
		name: "pods",
		trim: trimPod,
		informer: coreinformers.NewFilteredPodInformer(client, metav1.NamespaceAll, 0, byNamespace,
			func(o *metav1.ListOptions) {
				o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
			}),
	}
}

// customSource is a custom resource of the whole cluster.
func customSource(client dynamic.Interface, resource schema.GroupVersionResource, trim func(any) any) *source {
	return &source{
		name:     resource.GroupResource().String(),
		trim:     trim,
		informer: dynamicinformer.NewFilteredDynamicInformer(client, resource, metav1.NamespaceAll, 0, byNamespace, nil).Informer(),
	}
}

// watch prepares the informer: trim what it stores, tell changed which namespace
// an event was in, remember what goes wrong.
func (s *source) watch(log *slog.Logger, changed func(namespace string)) error {
	if err := s.informer.SetTransform(func(obj any) (any, error) { return s.trim(obj), nil }); err != nil {
		return err
	}
	err := s.informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		s.failed(log, err)
	})
	if err != nil {
		return err
	}
	mark := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if o, err := meta.Accessor(obj); err == nil {
			changed(o.GetNamespace())
		}
	}
	s.handler, err = s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    mark,
		UpdateFunc: func(_, obj any) { mark(obj) },
		DeleteFunc: mark,
	})
	return err
}

// failed notes an error of the list or the watch. The informer goes on trying by
// itself, with back-off; the log gets each error once, not once a try.
func (s *source) failed(log *slog.Logger, err error) {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // an ordinary end of a watch; a new list follows
	}
	err = advise(s.name, err)
	s.mu.Lock()
	news := s.lastErr == nil || s.lastErr.Error() != err.Error()
	s.lastErr = err
	s.mu.Unlock()
	if news {
		log.Warn("cannot watch the API server; trying again", "error", err)
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
	default:
		return fmt.Errorf("%s: %w", name, err)
	}
}

// pending says why the source has not synced yet; nil once it has.
func (s *source) pending() error {
	if s.informer.HasSynced() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lastErr != nil {
		return s.lastErr
	}
	return fmt.Errorf("%s: waiting for the first list", s.name)
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
