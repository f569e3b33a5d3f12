package aadpodidentity

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// spoil changes all that a copy could share with its original.
func spoil(object runtime.Object) {
	meta := func(m *metav1.ObjectMeta) {
		m.Name, m.Labels[NodeNameLabel], m.Annotations[BehaviorAnnotation] = "spoilt", "spoilt", "spoilt"
	}
	switch o := object.(type) {
	case *AzureIdentity:
		meta(&o.ObjectMeta)
		o.Spec.AuxiliaryTenantIDs[0], *o.Spec.Replicas, o.Spec.ClientPassword.Name = "spoilt", 9, "spoilt"
	case *AzureIdentityBinding:
		meta(&o.ObjectMeta)
		o.Spec.Selector = "spoilt"
	case *AzureAssignedIdentity:
		meta(&o.ObjectMeta)
		*o.Spec.Replicas, o.Status.Status = 9, "spoilt"
		spoil(o.Spec.AzureIdentityRef)
		spoil(o.Spec.AzureBindingRef)
	case *AzurePodIdentityException:
		meta(&o.ObjectMeta)
		o.Spec.PodLabels["app"] = "spoilt"
	}
}

func lists() []runtime.Object {
	all := full()
	meta := metav1.ListMeta{ResourceVersion: "7"}
	return []runtime.Object{
		&AzureIdentityList{ListMeta: meta, Items: []AzureIdentity{*all[0].(*AzureIdentity)}},
		&AzureIdentityBindingList{ListMeta: meta, Items: []AzureIdentityBinding{*all[1].(*AzureIdentityBinding)}},
		&AzureAssignedIdentityList{ListMeta: meta, Items: []AzureAssignedIdentity{*all[2].(*AzureAssignedIdentity)}},
		&AzurePodIdentityExceptionList{ListMeta: meta, Items: []AzurePodIdentityException{*all[3].(*AzurePodIdentityException)}},
	}
}

func TestACopySharesNothing(t *testing.T) {
	for _, in := range append(full(), lists()...) {
		before, err := json.Marshal(in)
		require.NoError(t, err)
		out := in.DeepCopyObject()
		assert.Equal(t, in, out)
		switch o := out.(type) {
		case *AzureIdentityList:
			spoil(&o.Items[0])
		case *AzureIdentityBindingList:
			spoil(&o.Items[0])
		case *AzureAssignedIdentityList:
			spoil(&o.Items[0])
		case *AzurePodIdentityExceptionList:
			spoil(&o.Items[0])
		default:
			spoil(out)
		}
		assert.NotEqual(t, in, out)
		after, err := json.Marshal(in)
		require.NoError(t, err)
		assert.JSONEq(t, string(before), string(after), "%T", in)
	}
}

func TestWhatIsEmptyIsCopiedAsItIs(t *testing.T) {
	for _, in := range []runtime.Object{
		&AzureIdentity{}, &AzureIdentityBinding{}, &AzureAssignedIdentity{}, &AzurePodIdentityException{},
		&AzureIdentity{Spec: AzureIdentitySpec{Unreadable: "odd"}},
	} {
		assert.Equal(t, in, in.DeepCopyObject())
	}
}
