package aadpodidentity

import "sigs.k8s.io/json"

// An object that does not fit its type (stored before the definitions had a schema)
// must not keep a whole list from being read: its spec is left empty, which
// matches and grants nothing.

// tolerate decodes b into spec, or returns why it does not fit. Field names are
// case-sensitive, as everywhere in Kubernetes.
func tolerate[Spec any](b []byte, spec *Spec) (unreadable string) {
	var in Spec
	if err := json.UnmarshalCaseSensitivePreserveInts(b, &in); err != nil {
		return err.Error()
	}
	*spec = in
	return ""
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureIdentitySpec) UnmarshalJSON(b []byte) error {
	type plain AzureIdentitySpec // without this method
	*s = AzureIdentitySpec{}
	if why := tolerate(b, (*plain)(s)); why != "" {
		s.Unreadable = why
	}
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureIdentityBindingSpec) UnmarshalJSON(b []byte) error {
	type plain AzureIdentityBindingSpec
	*s = AzureIdentityBindingSpec{}
	tolerate(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzureAssignedIdentitySpec) UnmarshalJSON(b []byte) error {
	type plain AzureAssignedIdentitySpec
	*s = AzureAssignedIdentitySpec{}
	tolerate(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error.
func (s *AzurePodIdentityExceptionSpec) UnmarshalJSON(b []byte) error {
	type plain AzurePodIdentityExceptionSpec
	*s = AzurePodIdentityExceptionSpec{}
	tolerate(b, (*plain)(s))
	return nil
}

// UnmarshalJSON implements json.Unmarshaler. It returns no error. A status that does
// not fit must not read as none, which is what MIC wrote before there were states.
func (s *AzureAssignedIdentityStatus) UnmarshalJSON(b []byte) error {
	type plain AzureAssignedIdentityStatus
	*s = AzureAssignedIdentityStatus{}
	if tolerate(b, (*plain)(s)) != "" {
		s.Status = "unreadable"
	}
	return nil
}
