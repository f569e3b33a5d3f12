package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// micAssignments is the namespace in which MIC creates AzureAssignedIdentities, wherever it
// runs itself. For namespaced identities (by its flag --forceNamespaced or the annotation) it
// creates them in the identity's namespace, but does not move an existing assignment
// (aad-pod-identity v1.8.17, pkg/mic/mic.go, makeAssignedIDs and
// getAzureAssignedIdentitiesToUpdate).
const micAssignments = "default"

// fromAssignmentLocked makes an Identity of an assignment, or returns why it is unusable.
//
// An assignment gives whatever its author wrote. In namespace micAssignments the author is MIC,
// which has copied the AzureIdentity. In any other namespace it may be anyone with write access
// there. So an assignment in the pod's own namespace, where MIC creates those of namespaced
// identities, only counts if a binding and an AzureIdentity there give the pod the same
// identity. Assignments in other namespaces do not count.
func (r *Resolver) fromAssignmentLocked(a *assignmentInfo, info *podInfo, bound []candidate) (_ Identity, unusable string) {
	switch selector := a.binding.selector; {
	case a.Namespace != micAssignments && a.Namespace != info.Namespace:
		return Identity{}, fmt.Sprintf("is ignored: assignments in namespace %q do not count for this pod; MIC creates them in namespace %q, and those of namespaced identities in the pod's own", a.Namespace, micAssignments)
	case (r.cfg.Namespaced || a.identity.namespaced) && a.identity.Namespace != info.Namespace:
		return Identity{}, "is limited to pods of its own namespace"
	case selector != "" && selector != info.labels[aadpodidentity.BindingLabel]:
		// Assigned to a former pod of this name; MIC has not noticed yet.
		return Identity{}, fmt.Sprintf("was assigned by the selector %q, which no longer matches the pod's label", selector)
	case a.Namespace == micAssignments:
		identity := &a.identity
		// MIC's copy may be older than the annotation, which must count at once.
		if now := r.objects.identities[identity.ObjectName]; now != nil && now.federated != identity.federated {
			identity = now
		}
		return r.newIdentityLocked(identity, &a.binding, info)
	}
	for _, c := range bound {
		if c.unusable == "" && c.Namespace == info.Namespace && c.Namespace == a.identity.Namespace && c.Name == a.identity.Name &&
			c.ClientID == a.identity.clientID && c.ResourceID == a.identity.resourceID {
			return c.Identity, ""
		}
	}
	return Identity{}, fmt.Sprintf("no AzureIdentityBinding in namespace %q gives the pod with these IDs: outside of namespace %q an assignment only counts together with a binding", a.Namespace, micAssignments)
}

// decideStandardLocked gives a pod what MIC has assigned to it. Identities that a binding
// gives, and MIC has not assigned yet, are pending.
func (r *Resolver) decideStandardLocked(p *Pod) {
	bound := r.candidatesLocked(p.info)
	var unusable, untrusted []string
	for _, a := range r.assignmentsLocked(p.info) {
		switch id, why := r.fromAssignmentLocked(a, p.info, bound); {
		case why != "" && a.Namespace != micAssignments: // last, because anyone may have written it
			untrusted = append(untrusted, a.describe(why))
		case why != "":
			unusable = append(unusable, a.describe(why))
		case a.assigned:
			p.identities = appendIdentity(p.identities, id, p.Namespace)
		case a.pending:
			p.pending = appendIdentity(p.pending, id, p.Namespace)
		}
	}
	for _, c := range bound {
		if c.unusable != "" {
			unusable = append(unusable, c.String())
			continue
		}
		p.pending = appendIdentity(p.pending, c.Identity, p.Namespace)
	}
	p.unusable = joinFirst(append(unusable, untrusted...))
}

// describe says why an assignment gives the pod nothing.
func (a *assignmentInfo) describe(unusable string) string {
	return fmt.Sprintf("AzureAssignedIdentity %s names AzureIdentity %s, which %s", a.ObjectName, a.identity.ObjectName, unusable)
}

// assignmentsLocked are those to a pod, in the order of preference of their bindings.
func (r *Resolver) assignmentsLocked(info *podInfo) []*assignmentInfo {
	assignments := slices.Clone(r.objects.assignedByPod[info.ObjectName])
	slices.SortFunc(assignments, func(a, b *assignmentInfo) int {
		return cmp.Or(compareBindings(&a.binding, &b.binding), strings.Compare(a.Name, b.Name), strings.Compare(a.Namespace, b.Namespace))
	})
	return assignments
}
