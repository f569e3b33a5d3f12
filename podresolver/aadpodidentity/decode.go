package aadpodidentity

import "sigs.k8s.io/json"

// A malformed object (one stored before the CRDs had a schema) must not fail the list that it
// is in. Its spec is left empty, which matches nothing and grants nothing.

// decode decodes b into v, which is left alone if b is malformed. Field names are
// case-sensitive, as everywhere in Kubernetes.
func decode[T any](b []byte, v *T) error {
	var decoded T
	if err := json.UnmarshalCaseSensitivePreserveInts(b, &decoded); err != nil {
		return err
	}
	*v = decoded
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureIdentitySpec) UnmarshalJSON(b []byte) error {
	type plain AzureIdentitySpec // without this method
	*s = AzureIdentitySpec{}
	if err := decode(b, (*plain)(s)); err != nil {
		s.Unreadable = err.Error()
	}
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureIdentityBindingSpec) UnmarshalJSON(b []byte) error {
	type plain AzureIdentityBindingSpec
	*s = AzureIdentityBindingSpec{}
	_ = decode(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureAssignedIdentitySpec) UnmarshalJSON(b []byte) error {
	type plain AzureAssignedIdentitySpec
	*s = AzureAssignedIdentitySpec{}
	_ = decode(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzurePodIdentityExceptionSpec) UnmarshalJSON(b []byte) error {
	type plain AzurePodIdentityExceptionSpec
	*s = AzurePodIdentityExceptionSpec{}
	_ = decode(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error. A malformed status must not
// read as "", which early versions of MIC wrote for an assigned identity.
func (s *AzureAssignedIdentityStatus) UnmarshalJSON(b []byte) error {
	type plain AzureAssignedIdentityStatus
	*s = AzureAssignedIdentityStatus{}
	if decode(b, (*plain)(s)) != nil {
		s.Status = "unreadable"
	}
	return nil
}
