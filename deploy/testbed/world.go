package testbed

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// World is all that the agent meets: a node with its network, a metadata
// service, and a cluster that the project's manifests are applied to.
type World struct {
	*Network
	*ControlPlane
	IMDS       *imdstest.Server
	Kube       kubernetes.Interface // as the cluster's administrator
	Custom     dynamic.Interface    // likewise
	Kubeconfig string               // of the agent's service account

	manifests []*unstructured.Unstructured
	closers   []func() error
}

// NewWorld builds a world around the process's namespace, which must be that of
// EnterNode. The metadata service behaves as imds says. Close it when done.
func NewWorld(ctx context.Context, imds imdstest.Config) (_ *World, err error) {
	w := &World{IMDS: imdstest.NewServer(imds)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	if w.Network, err = NewNetwork(); err != nil {
		return nil, err
	}
	w.onClose(w.Network.Close)
	ln, err := w.Metadata.Listen(MetadataAddress)
	if err != nil {
		return nil, err
	}
	stop := w.IMDS.Serve(ln)
	w.onClose(func() error { stop(); return nil })
	return w, w.startCluster(ctx, 0)
}

func (w *World) onClose(fn func() error) { w.closers = append(w.closers, fn) }

// Close takes everything down.
func (w *World) Close() error {
	var errs []error
	for i := len(w.closers) - 1; i >= 0; i-- {
		errs = append(errs, w.closers[i]())
	}
	w.closers = nil
	return errors.Join(errs...)
}

// Leaks lists the requests that reached the metadata service past the agent: all
// that did not come from the node itself.
func (w *World) Leaks() []imdstest.Call {
	var leaks []imdstest.Call
	for _, call := range w.IMDS.Calls() {
		if call.From.String() != NodeAddress {
			leaks = append(leaks, call)
		}
	}
	return leaks
}

// CreateNamespace makes a Kubernetes namespace.
func (w *World) CreateNamespace(ctx context.Context, name string) error {
	_, err := w.Kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	return err
}

// CreatePod makes a pod object on the node, as scheduler and kubelet would leave
// it. With addr "" its address is not known yet, see SetPodAddress.
func (w *World) CreatePod(ctx context.Context, namespace, name, addr string, labels map[string]string) error {
	pods := w.Kube.CoreV1().Pods(namespace)
	_, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			NodeName:   NodeName,
			Containers: []corev1.Container{{Name: "app", Image: "example/app"}},
		},
	}, metav1.CreateOptions{})
	if err != nil || addr == "" {
		return err
	}
	return w.SetPodAddress(ctx, namespace, name, addr)
}

// SetPodAddress writes what the kubelet writes when the pod has its address and its
// containers have started, which is now. The pod's link must be there already.
func (w *World) SetPodAddress(ctx context.Context, namespace, name, addr string) error {
	return w.SetPodStarted(ctx, namespace, name, addr, time.Now())
}

// SetPodStarted is SetPodAddress for containers that started at another time.
func (w *World) SetPodStarted(ctx context.Context, namespace, name, addr string, started time.Time) error {
	status := fmt.Sprintf(`{"status":{"phase":"Running","podIP":%q,"podIPs":[{"ip":%q}],
		"containerStatuses":[{"name":"app","image":"example/app","imageID":"","ready":true,"started":true,"restartCount":0,"state":{"running":{"startedAt":%q}}}]}}`,
		addr, addr, started.UTC().Format(time.RFC3339))
	_, err := w.Kube.CoreV1().Pods(namespace).Patch(ctx, name, "application/merge-patch+json", []byte(status), metav1.PatchOptions{}, "status")
	return err
}

// EndPod deletes a pod with a minute's grace, in which all its containers end.
func (w *World) EndPod(ctx context.Context, namespace, name string) error {
	grace := int64(60)
	pods := w.Kube.CoreV1().Pods(namespace)
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		return err
	}
	now := time.Now().UTC().Format(time.RFC3339)
	status := fmt.Sprintf(`{"status":{"containerStatuses":[{"name":"app","image":"example/app","imageID":"","ready":false,"started":false,"restartCount":0,"state":{"running":null,"terminated":{"exitCode":0,"startedAt":%q,"finishedAt":%q}}}]}}`, now, now)
	_, err := pods.Patch(ctx, name, "application/merge-patch+json", []byte(status), metav1.PatchOptions{}, "status")
	return err
}

// DeletePod removes a pod object at once.
func (w *World) DeletePod(ctx context.Context, namespace, name string) error {
	now := int64(0)
	return w.Kube.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now})
}

// Bind makes an AzureIdentity and an AzureIdentityBinding of one name, for pods
// whose label aadpodidbinding is that name.
func (w *World) Bind(ctx context.Context, namespace, name string, id imdstest.Identity) error {
	object := func(kind string, spec map[string]any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind,
			"metadata": map[string]any{"namespace": namespace, "name": name}, "spec": spec,
		}}
	}
	return Apply(ctx, w.Custom, []*unstructured.Unstructured{
		object("AzureIdentity", map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID}),
		object("AzureIdentityBinding", map[string]any{"azureIdentity": name, "selector": name}),
	})
}

// Unbind removes what Bind made.
func (w *World) Unbind(ctx context.Context, namespace, name string) error {
	return errors.Join(
		w.Custom.Resource(aadpodidentity.AzureIdentityBindings).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{}),
		w.Custom.Resource(aadpodidentity.AzureIdentities).Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{}),
	)
}

// RemoveDefinition deletes a custom resource definition, and with it all objects
// of its kind, and returns what applies the project's manifests again.
func (w *World) RemoveDefinition(ctx context.Context, name string) (restore func(context.Context) error, err error) {
	definitions := w.Custom.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	if err := definitions.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return nil, err
	}
	err = poll(ctx, 30*time.Second, name+" to be gone", func() error {
		_, err := definitions.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is still there"), err)
	})
	return func(ctx context.Context) error { return Apply(ctx, w.Custom, w.manifests) }, err
}
