package resolvertest

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Node is the node of the pods that Pod makes.
const Node = "node1"

// Meta is the metadata of an object in namespace shop.
func Meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "shop", Name: name}
}

// In moves an object to another namespace, and returns it.
func In[T metav1.Object](namespace string, object T) T {
	object.SetNamespace(namespace)
	return object
}

// With changes an object, and returns it.
func With[T any](object *T, changes ...func(*T)) *T {
	for _, change := range changes {
		change(object)
	}
	return object
}

// Pod returns a running pod of Node. label is the value of aadpodidbinding; "" for no label.
func Pod(name, ip, label string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: Meta(name),
		Spec:       corev1.PodSpec{NodeName: Node, ServiceAccountName: ServiceAccountName},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
	p.UID = types.UID("uid-of-" + name)
	if label != "" {
		p.Labels = map[string]string{aadpodidentity.BindingLabel: label}
	}
	return p
}

// ServiceAccountName is that of the pods that Pod makes.
const ServiceAccountName = "cart"

// ServiceAccount returns the metadata of a service account.
func ServiceAccount(name string, annotations map[string]string) *metav1.PartialObjectMetadata {
	a := &metav1.PartialObjectMetadata{ObjectMeta: Meta(name)}
	a.UID, a.Annotations = types.UID("uid-of-"+name), annotations
	return a
}

// Federated annotates an identity as federated.
func Federated(id *aadpodidentity.AzureIdentity) *aadpodidentity.AzureIdentity {
	id.Annotations = map[string]string{aadpodidentity.FederatedAnnotation: "true"}
	return id
}

// Identity returns a user-assigned identity.
func Identity(name, clientID, resourceID string) *aadpodidentity.AzureIdentity {
	return &aadpodidentity.AzureIdentity{
		ObjectMeta: Meta(name),
		Spec:       aadpodidentity.AzureIdentitySpec{ClientID: clientID, ResourceID: resourceID},
	}
}

// Binding returns a binding of an identity to the pods with a label. All are of one age.
func Binding(name, selector, identity string) *aadpodidentity.AzureIdentityBinding {
	return BindingOfAge(name, selector, identity, 0)
}

// BindingOfAge returns a Binding that was created so long before the others.
func BindingOfAge(name, selector, identity string, age time.Duration) *aadpodidentity.AzureIdentityBinding {
	b := &aadpodidentity.AzureIdentityBinding{
		ObjectMeta: Meta(name),
		Spec:       aadpodidentity.AzureIdentityBindingSpec{Selector: selector, AzureIdentity: identity},
	}
	b.CreationTimestamp = metav1.NewTime(time.Unix(1_700_000_000, 0).Add(-age))
	return b
}

// Exception returns an exception for the pods that carry any of the labels.
func Exception(name string, labels map[string]string) *aadpodidentity.AzurePodIdentityException {
	return &aadpodidentity.AzurePodIdentityException{
		ObjectMeta: Meta(name),
		Spec:       aadpodidentity.AzurePodIdentityExceptionSpec{PodLabels: labels},
	}
}

// Assigned returns the assignment that MIC makes for a pod of Node in namespace shop.
func Assigned(name, podName, state string, id *aadpodidentity.AzureIdentity, b *aadpodidentity.AzureIdentityBinding) *aadpodidentity.AzureAssignedIdentity {
	return &aadpodidentity.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: aadpodidentity.AzureAssignedIdentitySpec{
			AzureIdentityRef: id, AzureBindingRef: b, Pod: podName, PodNamespace: "shop", NodeName: Node,
		},
		Status: aadpodidentity.AzureAssignedIdentityStatus{Status: state},
	}
}

// GUID makes a client ID of a short text, in the same case; "" of "".
func GUID(text string) string {
	if text == "" {
		return ""
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.ToLower(text))))
	id := strings.Join([]string{sum[:8], sum[8:12], sum[12:16], sum[16:20], sum[20:32]}, "-")
	if text != strings.ToLower(text) {
		return strings.ToUpper(id)
	}
	return id
}

// ResourceID makes the resource ID of a user-assigned identity of a short text; "" of "".
func ResourceID(text string) string {
	if text == "" {
		return ""
	}
	return "/subscriptions/S/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + strings.ReplaceAll(strings.Trim(text, "/"), "/", "-")
}
