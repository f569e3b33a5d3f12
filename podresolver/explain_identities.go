package podresolver

import (
	"errors"
	"fmt"
	"slices"
)

// explainIdentitiesLocked says what gives a pod its identities, what nearly does, and which of
// them the request gets.
func (r *Resolver) explainIdentitiesLocked(d *Decision, p *Pod, want Selector) {
	bound := r.candidatesLocked(p.info)
	labels, label := nearLabels(p.info)
	near := append(labels, r.nearBindingsLocked(p.info, label)...)
	bindings := r.explainBindingsLocked(p, bound, near)
	var assignments []string
	if r.cfg.Mode == Standard {
		assignments = r.explainAssignmentsLocked(p.info, bound)
	}

	chosen, err := p.Identity(want)
	none := len(p.usable(want))+len(p.pending) == 0
	var failing string
	switch {
	case err == nil:
		d.Chosen = &chosen
	case errors.Is(err, ErrNotAssigned), none && len(bound) == 0 && len(assignments) > 0:
		failing = stepAssignment
	case errors.Is(err, ErrServiceAccount), none && len(bound) == 0 && p.account != "":
		failing = stepAccount
	case none:
		failing = stepBinding
	default:
		failing = stepIdentity
	}
	var why cause
	if err != nil {
		if why = causeOf(err); errors.Is(err, ErrNoIdentity) {
			why = r.noIdentityLocked(p, append(r.nearExceptionsLocked(p.info), near...))
		}
		d.refuse(err, why)
	}
	step := func(name string, texts []string) {
		switch {
		case name == failing:
			d.add(name, Failed, why.fix, texts...)
		case name == stepAccount && p.account != "":
			d.add(name, Warning, correctAnnotations(p), texts...)
		default:
			d.add(name, OK, "", texts...)
		}
	}
	step(stepBinding, bindings)
	if failing == stepAssignment && len(assignments) == 0 {
		assignments = []string{"there is no AzureAssignedIdentity for it"}
	}
	if len(assignments) > 0 {
		step(stepAssignment, assignments)
	}
	if r.cfg.Federation.ServiceAccounts {
		step(stepAccount, r.explainAnnotatedLocked(p))
	}
	if !none && failing != stepAssignment && failing != stepAccount {
		step(stepIdentity, r.explainChoice(d, want, err))
	}
}

// explainBindingsLocked describes the bindings that match, and those that nearly do.
func (r *Resolver) explainBindingsLocked(p *Pod, bound []candidate, near []nearMiss) (texts []string) {
	if len(p.identities) >= maxIdentities && len(bound) > maxIdentities {
		texts = append(texts, fmt.Sprintf("%d AzureIdentityBindings match it, and a pod has %d identities of its own namespace at most, and as many of others: those of the oldest bindings", len(bound), maxIdentities))
	}
	for _, c := range bound {
		if c.unusable != "" {
			texts = append(texts, c.String())
		} else {
			texts = append(texts, fmt.Sprintf("AzureIdentityBinding %q has the selector %q and gives it AzureIdentity %q", c.binding.Name, c.binding.selector, c.Name))
		}
	}
	if len(bound) == 0 {
		texts = append(texts, r.unbound(p))
	}
	for _, miss := range near {
		texts = append(texts, miss.text)
	}
	return texts
}

// explainAssignmentsLocked describes MIC's assignments.
func (r *Resolver) explainAssignmentsLocked(info *podInfo, bound []candidate) (texts []string) {
	for _, a := range r.assignmentsLocked(info) {
		switch _, why := r.fromAssignmentLocked(a, info, bound); {
		case why != "":
			texts = append(texts, a.describe(why))
		case !a.assigned:
			texts = append(texts, fmt.Sprintf("AzureAssignedIdentity %s is for AzureIdentity %s, but its state is not Assigned", a.ObjectName, a.identity.ObjectName))
		default:
			texts = append(texts, fmt.Sprintf("AzureAssignedIdentity %s assigns AzureIdentity %s to it", a.ObjectName, a.identity.ObjectName))
		}
	}
	return texts
}

// explainChoice describes the choice between the identities of a pod; err is Pod.Identity's.
func (r *Resolver) explainChoice(d *Decision, want Selector, err error) (texts []string) {
	switch {
	case errors.Is(err, ErrMultipleIdentities):
		texts = append(texts, "it has several identities, and with --strict-identity-selection a request must name one")
	case err != nil:
		texts = append(texts, err.Error())
	case want != Selector{}:
		texts = append(texts, fmt.Sprintf("%s has the requested %s", d.Chosen.object(), want))
	case d.Chosen.Annotated() && len(d.Identities) > 1:
		texts = append(texts, fmt.Sprintf("it has %d, and a request that names none gets that of the annotation %s", len(d.Identities), ClientIDAnnotation))
	case len(d.Identities) > 1:
		texts = append(texts, fmt.Sprintf("it has %d, and a request that names none gets that of the oldest binding", len(d.Identities)))
	default:
		texts = append(texts, "it has one, which a request that names none gets")
	}
	var all []Identity
	for _, id := range slices.Concat(d.Identities, d.Pending) {
		all = appendIdentity(all, id, d.Namespace)
	}
	for _, id := range all {
		if id.ClientID == "" && len(r.cfg.Deny.ClientIDs) > 0 {
			texts = append(texts, fmt.Sprintf("AzureIdentity %q has no client ID; if its tokens are for a client ID in --deny-identity, requests for them are refused", id.Name))
		}
	}
	return texts
}
