package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// workers is how many objects are being created at once.
const workers = 64

// filler creates objects in a cluster.
type filler struct {
	*objects
	world  *testbed.World
	kube   kubernetes.Interface
	custom *rest.RESTClient
}

func newFiller(o *objects, w *testbed.World) (*filler, error) {
	admin := w.Admin()
	admin.QPS = -1 // no limit
	admin.UserAgent = "helm"
	admin.WarningHandler = rest.NoWarnings{}
	c := rest.CopyConfig(admin)
	c.GroupVersion = &aadpodidentity.GroupVersion
	c.APIPath = "/apis"
	c.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	custom, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, err
	}
	admin.ContentType = runtime.ContentTypeProtobuf
	kube, err := kubernetes.NewForConfig(admin)
	return &filler{o, w, kube, custom}, err
}

// addNamespaces creates the namespaces.
func (f *filler) addNamespaces(ctx context.Context) error {
	return many(ctx, namespaces, func(ctx context.Context, i int) error { return f.world.CreateNamespace(ctx, namespace(i)) })
}

// addIdentities creates the identities from one number to below another, and their bindings.
func (f *filler) addIdentities(ctx context.Context, from, to int) error {
	return many(ctx, to-from, func(ctx context.Context, n int) error {
		i := from + n
		if err := f.post(ctx, i, aadpodidentity.AzureIdentities, "AzureIdentity", meta(i, "AzureIdentity", f.identity(i)), f.identity(i)); err != nil {
			return err
		}
		return f.post(ctx, i, aadpodidentity.AzureIdentityBindings, "AzureIdentityBinding", meta(i, "AzureIdentityBinding", binding(i)), binding(i))
	})
}

// addCommon binds one more identity to the pods of the first ones, which they get by name.
func (f *filler) addCommon(ctx context.Context) error {
	return many(ctx, few, func(ctx context.Context, i int) error {
		name := map[string]any{"name": "zz-common", "namespace": namespace(i)} // after the others of the same age
		err := f.post(ctx, i, aadpodidentity.AzureIdentities, "AzureIdentity", name, map[string]any{"type": 0, "clientID": common.ClientID})
		if err != nil {
			return err
		}
		return f.post(ctx, i, aadpodidentity.AzureIdentityBindings, "AzureIdentityBinding", name, map[string]any{"azureIdentity": "zz-common", "selector": service(i)})
	})
}

func (f *filler) post(ctx context.Context, i int, resource schema.GroupVersionResource, kind string, meta, spec map[string]any) error {
	body, err := json.Marshal(map[string]any{"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind, "metadata": meta, "spec": spec})
	if err != nil {
		return err
	}
	return f.custom.Post().Namespace(namespace(i)).Resource(resource.Resource).Body(body).
		SetHeader("Content-Type", runtime.ContentTypeJSON).Do(ctx).Error()
}

// addNodePods creates the pods of the node; of so many identities, each pod is bound to one.
func (f *filler) addNodePods(ctx context.Context, identities int) error {
	return many(ctx, f.pods, func(ctx context.Context, i int) error {
		pods := f.kube.CoreV1().Pods(namespace(i % identities))
		pod, err := pods.Create(ctx, nodePod(i, i%identities), metav1.CreateOptions{FieldManager: "kube-controller-manager"})
		if err != nil {
			return err
		}
		_, err = pods.UpdateStatus(ctx, withStatus(pod, podAddress(i)), metav1.UpdateOptions{FieldManager: "kubelet"})
		return err
	})
}

// addOtherPods creates pods of other nodes.
func (f *filler) addOtherPods(ctx context.Context, n int) error {
	return many(ctx, n, func(ctx context.Context, i int) error {
		_, err := f.kube.CoreV1().Pods(namespace(i)).Create(ctx, otherPod(i), metav1.CreateOptions{FieldManager: "kube-controller-manager"})
		return err
	})
}

// many calls fn for every number below n, many at a time.
func many(ctx context.Context, n int, fn func(context.Context, int) error) error {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(workers)
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			if err := fn(ctx, i); err != nil {
				return fmt.Errorf("object %d of %d: %w", i+1, n, err)
			}
			return nil
		})
	}
	return group.Wait()
}
