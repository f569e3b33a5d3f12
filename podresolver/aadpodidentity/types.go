package aadpodidentity

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of all types here.
var GroupVersion = schema.GroupVersion{Group: "aadpodidentity.k8s.io", Version: "v1"}

// Resources as the API server names them in its paths.
var (
	AzureIdentities            = GroupVersion.WithResource("azureidentities")
	AzureIdentityBindings      = GroupVersion.WithResource("azureidentitybindings")
	AzureAssignedIdentities    = GroupVersion.WithResource("azureassignedidentities")
	AzurePodIdentityExceptions = GroupVersion.WithResource("azurepodidentityexceptions")
)

const (
	// BindingLabel is the pod label whose value is a binding's selector.
	BindingLabel = "aadpodidbinding"
	// BehaviorAnnotation on an AzureIdentity, with the value BehaviorNamespaced,
	// keeps it from pods of other namespaces.
	BehaviorAnnotation = "aadpodidentity.k8s.io/Behavior"
	// BehaviorNamespaced is the value of BehaviorAnnotation.
	BehaviorNamespaced = "namespaced"
	// FederatedAnnotation on an AzureIdentity of type 0, with the value "true", has its tokens
	// come by federation, from the pod's service account token, and never from IMDS.
	FederatedAnnotation = "aadpodidentity.k8s.io/Federated"
	// Created is the state of an AzureAssignedIdentity whose identity MIC has yet to
	// assign to the pod's node.
	Created = "Created"
	// Assigned is the state of one whose identity is assigned to the node.
	Assigned = "Assigned"
	// NodeNameLabel on an AzureAssignedIdentity is the name of its pod's node.
	NodeNameLabel = "nodename"
)

// IdentityType says how an AzureIdentity authenticates.
type IdentityType int

// The values of AzureIdentity.spec.type.
const (
	UserAssignedMSI             IdentityType = 0 // a user-assigned managed identity
	ServicePrincipal            IdentityType = 1 // a client secret
	ServicePrincipalCertificate IdentityType = 2 // a PKCS12 certificate
)

// String describes the type.
func (t IdentityType) String() string {
	switch t {
	case UserAssignedMSI:
		return "user-assigned managed identity"
	case ServicePrincipal:
		return "service principal with secret"
	case ServicePrincipalCertificate:
		return "service principal with certificate"
	default:
		return "unknown"
	}
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// AzureIdentity is an Azure identity and how to authenticate as it.
type AzureIdentity struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzureIdentitySpec `json:"spec"`
}

// AzureIdentitySpec describes the identity.
type AzureIdentitySpec struct {
	Type       IdentityType `json:"type"`
	ResourceID string       `json:"resourceID,omitempty"` // of a managed identity
	ClientID   string       `json:"clientID,omitempty"`   // of a managed identity or service principal
	Unreadable string       `json:"-"`                    // the decoding error of a malformed spec, whose other fields are empty

	// The remaining fields are for service principals.

	ClientPassword     SecretReference `json:"clientPassword,omitzero"`
	TenantID           string          `json:"tenantID,omitempty"`
	AuxiliaryTenantIDs []string        `json:"auxiliaryTenantIDs,omitempty"`
	ADResourceID       string          `json:"adResourceID,omitempty"`
	ADEndpoint         string          `json:"adEndpoint,omitempty"`
	Replicas           *int32          `json:"replicas,omitempty"` // never read
}

// SecretReference names the secret that holds a password or certificate.
type SecretReference struct {
	Name      string `json:"name,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// AzureIdentityBinding binds an AzureIdentity to the pods whose label aadpodidbinding
// equals Selector.
type AzureIdentityBinding struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzureIdentityBindingSpec `json:"spec"`
}

// AzureIdentityBindingSpec names the AzureIdentity and the selector.
type AzureIdentityBindingSpec struct {
	AzureIdentity string `json:"azureIdentity,omitempty"`
	Selector      string `json:"selector,omitempty"`
	Weight        int    `json:"weight,omitempty"` // never read
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// AzureAssignedIdentity assigns an identity to one pod. The MIC controller creates them
// (standard mode).
type AzureAssignedIdentity struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   AzureAssignedIdentitySpec   `json:"spec"`
	Status AzureAssignedIdentityStatus `json:"status,omitzero"`
}

// AzureAssignedIdentitySpec embeds the binding and the identity as they were
// when the assignment was made.
type AzureAssignedIdentitySpec struct {
	AzureIdentityRef *AzureIdentity        `json:"azureIdentityRef,omitempty"`
	AzureBindingRef  *AzureIdentityBinding `json:"azureBindingRef,omitempty"`
	Pod              string                `json:"pod,omitempty"`
	PodNamespace     string                `json:"podNamespace,omitempty"`
	NodeName         string                `json:"nodename,omitempty"`
	Replicas         *int32                `json:"replicas,omitempty"` // never read
}

// AzureAssignedIdentityStatus is the state of the assignment: "", "Created", "Assigned" or
// "Unassigned".
type AzureAssignedIdentityStatus struct {
	Status string `json:"status,omitempty"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// AzurePodIdentityException excepts the pods of its namespace that have any one of its
// labels: their requests are passed through to IMDS unchanged.
type AzurePodIdentityException struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzurePodIdentityExceptionSpec `json:"spec"`
}

// AzurePodIdentityExceptionSpec lists the labels.
type AzurePodIdentityExceptionSpec struct {
	PodLabels map[string]string `json:"podLabels,omitempty"`
}
