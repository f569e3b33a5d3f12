package podresolver

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Sources are where objects come from: what can be listed and watched. Options
// that a Resolver gives narrow what a source lists, and never widen it.
type Sources struct {
	Pods       cache.ListerWatcher // of one node
	Identities cache.ListerWatcher
	Bindings   cache.ListerWatcher
	Exceptions cache.ListerWatcher
	Assigned   cache.ListerWatcher // to pods of that node; not needed in Managed mode
}

// FromAPIServer returns sources for the pods of a node. Nothing is sent yet.
//
// The clients decode into the types that are needed, and no others: those for all
// of Kubernetes, or for objects of any type, cost more memory than everything that
// is stored in the end.
func FromAPIServer(config *rest.Config, node string) (Sources, error) {
	pods, err := client(config, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf, corev1.AddToScheme)
	if err != nil {
		return Sources{}, err
	}
	custom, err := client(config, aadpodidentity.GroupVersion, "/apis", runtime.ContentTypeJSON, aadpodidentity.AddToScheme)
	if err != nil {
		return Sources{}, err
	}
	onNode := fields.OneTermEqualSelector("spec.nodeName", node).String()
	assignedOnNode := labels.Set{aadpodidentity.NodeNameLabel: node}.AsSelector().String()
	return Sources{
		Pods: cache.NewFilteredListWatchFromClient(pods, "pods", metav1.NamespaceAll, func(o *metav1.ListOptions) {
			if o.FieldSelector != "" {
				o.FieldSelector += ","
			}
			o.FieldSelector += onNode
		}),
		Identities: newListing(custom, aadpodidentity.AzureIdentities, "AzureIdentity", "", identityParts, identityRowOf),
		Bindings: newListing(custom, aadpodidentity.AzureIdentityBindings, "AzureIdentityBinding", "",
			func(o *aadpodidentity.AzureIdentityBinding) decodeInto {
				return decodeInto{meta: &o.ObjectMeta, spec: &o.Spec}
			}, bindingRowOf),
		Exceptions: newListing(custom, aadpodidentity.AzurePodIdentityExceptions, "AzurePodIdentityException", "",
			func(o *aadpodidentity.AzurePodIdentityException) decodeInto {
				return decodeInto{meta: &o.ObjectMeta, spec: &o.Spec}
			}, exceptionRowOf),
		Assigned: newListing(custom, aadpodidentity.AzureAssignedIdentities, "AzureAssignedIdentity", assignedOnNode,
			func(o *aadpodidentity.AzureAssignedIdentity) decodeInto {
				return decodeInto{&o.ObjectMeta, &o.Spec, &o.Status}
			}, assignedRowFor(node)),
	}, nil
}

func identityParts(o *aadpodidentity.AzureIdentity) decodeInto {
	return decodeInto{meta: &o.ObjectMeta, spec: &o.Spec}
}

// client returns a REST client for one group and version.
func client(config *rest.Config, version schema.GroupVersion, path, contentType string, addToScheme func(*runtime.Scheme) error) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := addToScheme(scheme); err != nil {
		return nil, fmt.Errorf("types of %s: %w", version, err)
	}
	c := rest.CopyConfig(config)
	c.GroupVersion = &version
	c.APIPath = path
	c.ContentType = contentType
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	out, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("client for %s: %w", version, err)
	}
	return out, nil
}

// NodeOf asks the API server which node a pod is on.
func NodeOf(ctx context.Context, config *rest.Config, namespace, podName string) (string, error) {
	c, err := client(config, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf, corev1.AddToScheme)
	if err != nil {
		return "", err
	}
	var list corev1.PodList
	err = c.Get().Namespace(namespace).Resource("pods").
		VersionedParams(&metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", podName).String()}, metav1.ParameterCodec).
		Do(ctx).Into(&list)
	switch {
	case err != nil:
		return "", advise("pods", err)
	case len(list.Items) == 0:
		return "", fmt.Errorf("%s/%s: there is no such pod", namespace, podName)
	case list.Items[0].Spec.NodeName == "":
		return "", fmt.Errorf("%s/%s is on no node yet", namespace, podName)
	}
	return list.Items[0].Spec.NodeName, nil
}
