package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// micAssignments is the namespace in which MIC makes AzureAssignedIdentities, wherever it
// runs itself. For identities that are for their own namespace (its flag --forceNamespaced,
// or the annotation) it makes them in that one, and an assignment that it made before stays
// where it is (aad-pod-identity v1.8.17, pkg/mic/mic.go, makeAssignedIDs and
// getAzureAssignedIdentitiesToUpdate).
const micAssignments = "default"

// assigned turns MIC's assignment into an Identity, or says why the pod cannot use it.
//
// What an assignment gives, its author says. In namespace micAssignments that is MIC, and
// it has copied the AzureIdentity. Anywhere else it can be whoever may write in that
// namespace. So one that is where MIC puts those of namespaced identities, in the pod's
// own, counts only for what an AzureIdentity and a binding there give to the pod too, and
// any other counts for nothing.
func (r *Resolver) assigned(a *assignedRow, row *podRow, bound []candidate) (_ Identity, why string) {
	switch selector := a.binding.selector; {
	case a.Namespace != micAssignments && a.Namespace != row.Namespace:
		return Identity{}, fmt.Sprintf("it does not give: assignments of namespace %q do not count for this pod; MIC makes them in namespace %q, and those of namespaced identities in the pod's own", a.Namespace, micAssignments)
	case (r.cfg.Namespaced || a.identity.namespaced) && a.identity.Namespace != row.Namespace:
		return Identity{}, "is for pods of its own namespace only"
	case selector != "" && selector != row.labels[aadpodidentity.BindingLabel]:
		// Assigned to a pod of this name before; MIC has not noticed yet.
		return Identity{}, fmt.Sprintf("was assigned by the selector %q, which the pod's label no longer has", selector)
	case a.Namespace == micAssignments:
		return r.usable(&a.identity, &a.binding)
	}
	for _, c := range bound {
		if c.why == "" && c.Namespace == row.Namespace && c.Namespace == a.identity.Namespace && c.Name == a.identity.Name &&
			c.ClientID == a.identity.clientID && c.ResourceID == a.identity.resourceID {
			return c.Identity, ""
		}
	}
	return Identity{}, fmt.Sprintf("no binding of namespace %q gives to the pod with these IDs: an assignment outside of namespace %q counts only for what one does", a.Namespace, micAssignments)
}

// decideStandard gives a pod what MIC assigned to it. What a binding would give,
// and MIC has not assigned yet, is worth waiting for.
func (r *Resolver) decideStandard(p *Pod) {
	bound := r.candidates(p.row)
	var unusable, elsewhere []string
	for _, a := range r.assignments(p.row) {
		switch id, why := r.assigned(a, p.row, bound); {
		case why != "" && a.Namespace != micAssignments: // last, since anybody may have written it
			elsewhere = append(elsewhere, a.not(why))
		case why != "":
			unusable = append(unusable, a.not(why))
		case a.ready:
			p.identities = appendIdentity(p.identities, id)
		case a.coming:
			p.pending = appendIdentity(p.pending, id)
		}
	}
	for _, c := range bound {
		if c.why != "" {
			unusable = append(unusable, c.String())
			continue
		}
		p.pending = appendIdentity(p.pending, c.Identity)
	}
	p.unusable = some(append(unusable, elsewhere...))
}

// not says why an assignment gives nothing.
func (a *assignedRow) not(why string) string {
	return fmt.Sprintf("AzureAssignedIdentity %s/%s names AzureIdentity %s/%s, which %s", a.Namespace, a.Name, a.identity.Namespace, a.identity.Name, why)
}

// assignments are those to a pod, in the order of preference of their bindings.
func (r *Resolver) assignments(row *podRow) []*assignedRow {
	assigned := slices.Clone(r.tables.assignedByPod[row.ObjectName])
	slices.SortFunc(assigned, func(a, b *assignedRow) int {
		return cmp.Or(preferred(&a.binding, &b.binding), strings.Compare(a.Name, b.Name), strings.Compare(a.Namespace, b.Namespace))
	})
	return assigned
}
