package main

import (
	"context"
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

// Creating that many objects is a matter of how many are under way.
const (
	workers     = 64
	fillTimeout = 8 * time.Minute
)

// fill makes the objects in a cluster: the first identities with their bindings,
// the pods of the node, and pods of other nodes.
func (o *objects) fill(ctx context.Context, w *testbed.World, identities, others int) error {
	ctx, cancel := context.WithTimeout(ctx, fillTimeout)
	defer cancel()
	admin := w.Admin()
	admin.QPS = -1 // no limit
	admin.UserAgent = "helm"
	admin.WarningHandler = rest.NoWarnings{}
	custom, err := customClient(admin)
	if err != nil {
		return err
	}
	admin = rest.CopyConfig(admin)
	admin.ContentType = runtime.ContentTypeProtobuf
	kube, err := kubernetes.NewForConfig(admin)
	if err != nil {
		return err
	}

	err = many(ctx, namespaces, func(ctx context.Context, i int) error { return w.CreateNamespace(ctx, namespace(i)) })
	if err != nil {
		return err
	}
	create := func(resource schema.GroupVersionResource, body func(int) ([]byte, error)) func(context.Context, int) error {
		return func(ctx context.Context, i int) error {
			b, err := body(i)
			if err != nil {
				return err
			}
			return custom.Post().Namespace(namespace(i)).Resource(resource.Resource).Body(b).
				SetHeader("Content-Type", runtime.ContentTypeJSON).Do(ctx).Error()
		}
	}
	if err := many(ctx, identities, create(aadpodidentity.AzureIdentities, o.identity)); err != nil {
		return err
	}
	if err := many(ctx, identities, create(aadpodidentity.AzureIdentityBindings, o.binding)); err != nil {
		return err
	}
	err = many(ctx, o.pods, func(ctx context.Context, i int) error {
		pods := kube.CoreV1().Pods(namespace(i))
		pod, err := pods.Create(ctx, o.nodePod(i), metav1.CreateOptions{FieldManager: "kube-controller-manager"})
		if err != nil {
			return err
		}
		_, err = pods.UpdateStatus(ctx, running(pod, podAddress(i)), metav1.UpdateOptions{FieldManager: "kubelet"})
		return err
	})
	if err != nil {
		return err
	}
	return many(ctx, others, func(ctx context.Context, i int) error {
		_, err := kube.CoreV1().Pods(namespace(i)).Create(ctx, otherPod(i), metav1.CreateOptions{FieldManager: "kube-controller-manager"})
		return err
	})
}

// many calls fn for every number below n, many at a time.
func many(ctx context.Context, n int, fn func(context.Context, int) error) error {
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

func customClient(admin *rest.Config) (*rest.RESTClient, error) {
	c := rest.CopyConfig(admin)
	c.GroupVersion = &aadpodidentity.GroupVersion
	c.APIPath = "/apis"
	c.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	return rest.RESTClientFor(c)
}
