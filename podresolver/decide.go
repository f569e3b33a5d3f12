package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// namespaceObjects is all that bears on the pods of one namespace.
type namespaceObjects struct {
	identities map[string]*aadpodidentity.AzureIdentity // by name
	bindings   []*aadpodidentity.AzureIdentityBinding   // in order, see sortBindings
	exceptions []*aadpodidentity.AzurePodIdentityException
}

// sortBindings puts bindings in the order in which their identities are
// preferred: the oldest first, then by name. The order decides what a pod gets
// that names no identity, so it must be the same on every node and after every
// restart.
func sortBindings(bindings []*aadpodidentity.AzureIdentityBinding) {
	slices.SortFunc(bindings, func(a, b *aadpodidentity.AzureIdentityBinding) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
}

// decide is managed mode in one pure function: a pod, the objects of its
// namespace, and what follows from them.
func decide(pod *corev1.Pod, ns *namespaceObjects) *Pod {
	p := &Pod{Namespace: pod.Namespace, Name: pod.Name}
	for _, exception := range ns.exceptions {
		if matchesAny(pod.Labels, exception.Spec.PodLabels) {
			p.exception = exception.Name
			return p
		}
	}

	label := pod.Labels[aadpodidentity.BindingLabel]
	if label == "" { // an empty selector matches nothing, so no label matches nothing
		p.refusal = fmt.Errorf("%w: it has no label %q", ErrNoIdentity, aadpodidentity.BindingLabel)
		return p
	}
	var unusable []string
	for _, binding := range ns.bindings {
		if binding.Spec.Selector != label {
			continue
		}
		id, why := usable(ns.identities[binding.Spec.AzureIdentity])
		id.Binding = binding.Name
		twice := slices.ContainsFunc(p.identities, func(other Identity) bool { return other.Name == id.Name })
		switch {
		case why != "":
			unusable = append(unusable, fmt.Sprintf("AzureIdentityBinding %q names AzureIdentity %q, which %s", binding.Name, binding.Spec.AzureIdentity, why))
		case !twice: // two bindings may name one identity
			p.identities = append(p.identities, id)
		}
	}
	switch {
	case len(p.identities) > 0:
	case len(unusable) > 0:
		p.refusal = fmt.Errorf("%w: %s", ErrNoIdentity, strings.Join(unusable, "; "))
	default:
		p.refusal = fmt.Errorf("%w: no AzureIdentityBinding in namespace %q has the selector %q", ErrNoIdentity, pod.Namespace, label)
	}
	return p
}

// usable turns an AzureIdentity into an Identity, or says why it cannot.
func usable(in *aadpodidentity.AzureIdentity) (_ Identity, why string) {
	switch {
	case in == nil:
		return Identity{}, "does not exist in this namespace"
	case in.Spec.Type == aadpodidentity.UserAssignedMSI && in.Spec.ClientID == "" && in.Spec.ResourceID == "":
		// IMDS would read a request without an ID as one for the node's own identity.
		return Identity{}, "has neither clientID nor resourceID"
	}
	return Identity{
		Namespace:  in.Namespace,
		Name:       in.Name,
		Type:       in.Spec.Type,
		ClientID:   strings.ToLower(in.Spec.ClientID),
		ResourceID: strings.ToLower(in.Spec.ResourceID),
	}, ""
}

// matchesAny reports whether any one wanted label is among a pod's: keys match
// exactly, values without regard to case, as in the old NMI.
func matchesAny(have, want map[string]string) bool {
	for key, wanted := range want {
		if value, ok := have[key]; ok && strings.EqualFold(value, wanted) {
			return true
		}
	}
	return false
}
