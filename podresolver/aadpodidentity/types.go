// Package aadpodidentity holds the Go types of the four custom resources of
// aad-pod-identity: group aadpodidentity.k8s.io, version v1, all namespaced.
//
// They are read as the API server stores them, never written by the agent.
// Field names are those of the published definitions, case included.
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
	// Created is the state of an AzureAssignedIdentity whose identity is not on the
	// pod's node yet.
	Created = "Created"
	// Assigned is the state of one whose identity is.
	Assigned = "Assigned"
	// NodeNameLabel on an AzureAssignedIdentity is the node that its pod is on.
	NodeNameLabel = "nodename"
)

// IdentityType says how an AzureIdentity authenticates.
type IdentityType int

// The types that there are.
const (
	UserAssignedMSI             IdentityType = 0 // a user-assigned managed identity
	ServicePrincipal            IdentityType = 1 // a client secret
	ServicePrincipalCertificate IdentityType = 2 // a PKCS12 certificate
)

// String names the type as a user would.
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

// AzureIdentity is an identity in Azure and how to become it.
type AzureIdentity struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzureIdentitySpec `json:"spec"`
}

// AzureIdentitySpec describes the identity.
type AzureIdentitySpec struct {
	Type       IdentityType `json:"type"`
	ResourceID string       `json:"resourceID,omitempty"` // of a managed identity
	ClientID   string       `json:"clientID,omitempty"`   // of either kind
	Unreadable string       `json:"-"`                    // why the stored spec does not fit this type; the rest is empty then

	// The rest is for service principals.

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

// AzureIdentityBinding gives an AzureIdentity to the pods whose label
// aadpodidbinding has the value Selector.
type AzureIdentityBinding struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzureIdentityBindingSpec `json:"spec"`
}

// AzureIdentityBindingSpec joins an identity's name to a selector.
type AzureIdentityBindingSpec struct {
	AzureIdentity string `json:"azureIdentity,omitempty"`
	Selector      string `json:"selector,omitempty"`
	Weight        int    `json:"weight,omitempty"` // never read
}

// AzureAssignedIdentity is an identity given to one pod by the MIC controller
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

// AzureAssignedIdentityStatus says how far the assignment has come: "",
// "Created", "Assigned" or "Unassigned".
type AzureAssignedIdentityStatus struct {
	Status string `json:"status,omitempty"`
}

// AzurePodIdentityException excepts pods of its namespace that carry any one of
// its labels: what they send to IMDS is passed on unprocessed.
type AzurePodIdentityException struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AzurePodIdentityExceptionSpec `json:"spec"`
}

// AzurePodIdentityExceptionSpec lists the labels.
type AzurePodIdentityExceptionSpec struct {
	PodLabels map[string]string `json:"podLabels,omitempty"`
}
