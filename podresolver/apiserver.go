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

// Sources list and watch the objects that a Resolver needs. The options that it passes must
// narrow what a source lists, and never widen it.
type Sources struct {
	Pods       cache.ListerWatcher // of one node
	Identities cache.ListerWatcher
	Bindings   cache.ListerWatcher
	Exceptions cache.ListerWatcher
	Assigned   cache.ListerWatcher // to pods of that node; nil in Managed mode
	// ServiceAccounts are their metadata alone, as metav1.PartialObjectMetadata; nil without
	// Federation.ServiceAccounts.
	ServiceAccounts cache.ListerWatcher
}

// everyNode stands for the node of an Inventory. No node has that name.
const everyNode = "*"

// FromAPIServer returns Sources for the pods of a node, or of all nodes if that is "". It sends
// nothing yet.
//
// The clients know only the types that are needed: a clientset or a dynamic client costs more
// memory than all objects that are stored.
func FromAPIServer(config *rest.Config, node string) (Sources, error) {
	pods, err := client(config, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf, corev1.AddToScheme)
	if err != nil {
		return Sources{}, err
	}
	custom, err := client(config, aadpodidentity.GroupVersion, "/apis", runtime.ContentTypeJSON, aadpodidentity.AddToScheme)
	if err != nil {
		return Sources{}, err
	}
	metadata, err := client(config, corev1.SchemeGroupVersion, "/api", runtime.ContentTypeJSON, addMetadata)
	if err != nil {
		return Sources{}, err
	}
	onNode, assignedOnNode := fields.Everything().String(), ""
	if node != "" {
		onNode = fields.OneTermEqualSelector("spec.nodeName", node).String()
		assignedOnNode = labels.Set{aadpodidentity.NodeNameLabel: node}.AsSelector().String()
	} else {
		node = everyNode
	}
	return Sources{
		Pods: cache.NewFilteredListWatchFromClient(pods, "pods", metav1.NamespaceAll, func(o *metav1.ListOptions) {
			if o.FieldSelector != "" && onNode != "" {
				o.FieldSelector += ","
			}
			o.FieldSelector += onNode
		}),
		Identities: newListStream(custom, aadpodidentity.AzureIdentities, "AzureIdentity", "", identityTargets, newIdentityInfo),
		Bindings: newListStream(custom, aadpodidentity.AzureIdentityBindings, "AzureIdentityBinding", "",
			func(o *aadpodidentity.AzureIdentityBinding) decodeTargets {
				return decodeTargets{meta: &o.ObjectMeta, spec: &o.Spec}
			}, newBindingInfo),
		Exceptions: newListStream(custom, aadpodidentity.AzurePodIdentityExceptions, "AzurePodIdentityException", "",
			func(o *aadpodidentity.AzurePodIdentityException) decodeTargets {
				return decodeTargets{meta: &o.ObjectMeta, spec: &o.Spec}
			}, newExceptionInfo),
		Assigned: newListStream(custom, aadpodidentity.AzureAssignedIdentities, "AzureAssignedIdentity", assignedOnNode,
			func(o *aadpodidentity.AzureAssignedIdentity) decodeTargets {
				return decodeTargets{&o.ObjectMeta, &o.Spec, &o.Status}
			}, assignmentInfoFor(node)),
		ServiceAccounts: newMetadataStream(metadata, serviceAccounts, newAccountInfo),
	}, nil
}

func identityTargets(o *aadpodidentity.AzureIdentity) decodeTargets {
	return decodeTargets{meta: &o.ObjectMeta, spec: &o.Spec}
}

// client returns a REST client for one group and version.
func client(config *rest.Config, version schema.GroupVersion, path, contentType string, addToScheme func(*runtime.Scheme) error) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := addToScheme(scheme); err != nil {
		return nil, fmt.Errorf("adding the types of %s: %w", version, err)
	}
	c := rest.CopyConfig(config)
	c.GroupVersion = &version
	c.APIPath = path
	c.ContentType = contentType
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	out, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("creating a client for %s: %w", version, err)
	}
	return out, nil
}

// NodeOf returns the name of the node that a pod is on, from the API server.
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
		return "", explainAPIError("pods", err)
	case len(list.Items) == 0:
		return "", fmt.Errorf("pod %s/%s not found", namespace, podName)
	case list.Items[0].Spec.NodeName == "":
		return "", fmt.Errorf("pod %s/%s is not scheduled to a node yet", namespace, podName)
	}
	return list.Items[0].Spec.NodeName, nil
}
