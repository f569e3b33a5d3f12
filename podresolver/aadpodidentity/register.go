package aadpodidentity

import (
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// AddToScheme makes the types and their lists known to a scheme, which clients
// need to decode them.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&AzureIdentity{}, &AzureIdentityList{},
		&AzureIdentityBinding{}, &AzureIdentityBindingList{},
		&AzureAssignedIdentity{}, &AzureAssignedIdentityList{},
		&AzurePodIdentityException{}, &AzurePodIdentityExceptionList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// list is what the API server answers to a list of one of the types.
type list[T any] struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []T `json:"items"`
}

// AzureIdentityList is a list of AzureIdentities.
type AzureIdentityList list[AzureIdentity]

// AzureIdentityBindingList is a list of AzureIdentityBindings.
type AzureIdentityBindingList list[AzureIdentityBinding]

// AzureAssignedIdentityList is a list of AzureAssignedIdentities.
type AzureAssignedIdentityList list[AzureAssignedIdentity]

// AzurePodIdentityExceptionList is a list of AzurePodIdentityExceptions.
type AzurePodIdentityExceptionList list[AzurePodIdentityException]

// The rest makes them objects of apimachinery.

func (in *AzureIdentity) deepCopy() *AzureIdentity {
	if in == nil {
		return nil
	}
	out := *in
	in.DeepCopyInto(&out.ObjectMeta)
	out.Spec.AuxiliaryTenantIDs = slices.Clone(in.Spec.AuxiliaryTenantIDs)
	out.Spec.Replicas = clone(in.Spec.Replicas)
	return &out
}

func (in *AzureIdentityBinding) deepCopy() *AzureIdentityBinding {
	if in == nil {
		return nil
	}
	out := *in
	in.DeepCopyInto(&out.ObjectMeta)
	return &out
}

func (in *AzureAssignedIdentity) deepCopy() *AzureAssignedIdentity {
	out := *in
	in.DeepCopyInto(&out.ObjectMeta)
	out.Spec.AzureIdentityRef = in.Spec.AzureIdentityRef.deepCopy()
	out.Spec.AzureBindingRef = in.Spec.AzureBindingRef.deepCopy()
	out.Spec.Replicas = clone(in.Spec.Replicas)
	return &out
}

func (in *AzurePodIdentityException) deepCopy() *AzurePodIdentityException {
	out := *in
	in.DeepCopyInto(&out.ObjectMeta)
	out.Spec.PodLabels = maps.Clone(in.Spec.PodLabels)
	return &out
}

func clone[T any](p *T) *T {
	if p == nil {
		return nil
	}
	v := *p
	return &v
}

func copyItems[T any](items []T, deepCopy func(*T) *T) []T {
	out := make([]T, len(items))
	for i := range items {
		out[i] = *deepCopy(&items[i])
	}
	return out
}

// DeepCopyObject implements runtime.Object.
func (in *AzureIdentity) DeepCopyObject() runtime.Object { return in.deepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *AzureIdentityBinding) DeepCopyObject() runtime.Object { return in.deepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *AzureAssignedIdentity) DeepCopyObject() runtime.Object { return in.deepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *AzurePodIdentityException) DeepCopyObject() runtime.Object { return in.deepCopy() }

// DeepCopyObject implements runtime.Object.
func (in *AzureIdentityList) DeepCopyObject() runtime.Object {
	out := *in
	out.Items = copyItems(in.Items, (*AzureIdentity).deepCopy)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (in *AzureIdentityBindingList) DeepCopyObject() runtime.Object {
	out := *in
	out.Items = copyItems(in.Items, (*AzureIdentityBinding).deepCopy)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (in *AzureAssignedIdentityList) DeepCopyObject() runtime.Object {
	out := *in
	out.Items = copyItems(in.Items, (*AzureAssignedIdentity).deepCopy)
	return &out
}

// DeepCopyObject implements runtime.Object.
func (in *AzurePodIdentityExceptionList) DeepCopyObject() runtime.Object {
	out := *in
	out.Items = copyItems(in.Items, (*AzurePodIdentityException).deepCopy)
	return &out
}
