package aadpodidentity

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// AddToScheme adds the types to a scheme, which a client needs to decode watch events. There
// are no list types: podresolver decodes lists one item at a time.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&AzureIdentity{}, &AzureIdentityBinding{}, &AzureAssignedIdentity{}, &AzurePodIdentityException{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
