package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// decide says what follows from the tables for one pod. The tables are locked.
func (r *Resolver) decide(row *podRow) *Pod {
	p := &Pod{Namespace: row.namespace, Name: row.name, UID: row.uid, Started: row.started, strict: r.cfg.StrictSelection}
	exception, ignored := r.exceptionOf(row)
	if p.exception = exception; exception != "" {
		p.refusal = fmt.Errorf("%w: it is excepted", ErrNoIdentity)
		return p
	}
	if r.cfg.Mode == Standard {
		r.decideStandard(p, row)
	} else {
		r.decideManaged(p, row)
	}
	if p.refusal != nil && ignored != "" {
		p.refusal = fmt.Errorf("%w; %s", p.refusal, ignored)
	}
	return p
}

// exceptionOf names the exception that applies to a pod, "" if none does; of
// several the first by name. ignored says which one would apply if exceptions of its
// namespace counted.
func (r *Resolver) exceptionOf(row *podRow) (name, ignored string) {
	for _, exception := range r.tables.exceptionsByNS[row.namespace] {
		if matchedLabel(row.labels, exception.labels) != "" && (name == "" || exception.name < name) {
			name = exception.name
		}
	}
	if allowed := r.cfg.ExceptionNamespaces; name != "" && allowed != nil && !slices.Contains(allowed, row.namespace) {
		ignored = fmt.Sprintf("AzurePodIdentityException %q does not count: namespace %q is not in --%s", name, row.namespace, ExceptionNamespacesFlag)
		name = ""
	}
	if name == "" && row.mic {
		name = micException
	}
	return name, ignored
}

// micException stands for the exception that MIC's own pods need no object for.
const micException = "(MIC's own)"

// matchedLabel returns the key of a wanted label that is among a pod's, the first
// by name, or "". Keys match exactly, values without regard to case, as in the old
// NMI.
func matchedLabel(have, want map[string]string) (matched string) {
	for key, wanted := range want {
		if value, ok := have[key]; ok && strings.EqualFold(value, wanted) && (matched == "" || key < matched) {
			matched = key
		}
	}
	return matched
}

// candidate is an identity that a binding gives to a pod, or why it does not.
type candidate struct {
	Identity
	binding *bindingRow
	why     string // it cannot be used; "" if it can
}

// candidates are what the bindings give to a pod, in the order of preference: the
// oldest binding first, then by name. The order decides what a pod gets that names
// no identity, so it must be the same on every node and after every restart.
func (r *Resolver) candidates(row *podRow) []candidate {
	label := row.labels[aadpodidentity.BindingLabel]
	if label == "" {
		return nil // an empty selector matches nothing, so no label matches nothing
	}
	bindings := slices.Clone(r.tables.bindingsBySelector[r.tables.key(row.namespace, label)])
	slices.SortFunc(bindings, preferred)
	found := make([]candidate, 0, len(bindings))
	for _, binding := range bindings {
		id := r.tables.identities[ref{binding.namespace, binding.identity}]
		c := candidate{binding: binding}
		switch {
		case id == nil:
			c.why = "does not exist in the binding's namespace"
		case binding.namespace != row.namespace && (r.cfg.Namespaced || id.namespaced):
			c.why = "is for pods of its own namespace only"
		default:
			c.Identity, c.why = r.usable(id, binding)
		}
		found = append(found, c)
	}
	return found
}

func preferred(a, b *bindingRow) int {
	return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.name, b.name), cmp.Compare(a.namespace, b.namespace))
}

// usable turns a row into an Identity, or says why it cannot.
func (r *Resolver) usable(in *identityRow, binding *bindingRow) (_ Identity, why string) {
	switch {
	case in.unreadable != "":
		why = "cannot be read: " + in.unreadable
	case in.principal != nil:
		why = r.unfit(in)
	case in.kind != aadpodidentity.UserAssignedMSI:
		why = fmt.Sprintf("is of type %d, which is unknown", in.kind)
	case in.clientID == "" && in.resourceID == "":
		// IMDS would read a request without an ID as one for the node's own identity.
		why = "has neither clientID nor resourceID"
	default:
		why = checkResourceID(in.resourceID)
	}
	why = cmp.Or(why, checkClientID(in.clientID), r.cfg.Deny.reason(in))
	if why != "" {
		return Identity{}, why
	}
	return Identity{
		Namespace: in.namespace, Name: in.name, Type: in.kind,
		ClientID: in.clientID, ResourceID: in.resourceID, Binding: binding.name,
		Principal: in.principal,
	}, ""
}

// maxAuxiliaryTenants bounds what one request can ask of Entra. Azure Resource
// Manager takes tokens of at most three ("Authenticate requests across tenants").
const maxAuxiliaryTenants = 10

// unfit says why a service principal cannot be used, "" if it can.
func (r *Resolver) unfit(in *identityRow) string {
	switch p := in.principal; {
	case in.clientID == "":
		return "has no clientID"
	case p.TenantID == "":
		return "has no tenantID"
	case p.SecretName == "":
		return "names no secret in clientPassword"
	case len(p.AuxiliaryTenantIDs) > maxAuxiliaryTenants:
		return fmt.Sprintf("has %d auxiliaryTenantIDs, more than %d", len(p.AuxiliaryTenantIDs), maxAuxiliaryTenants)
	case p.SecretNamespace != in.namespace && (r.cfg.Mode != Standard || r.cfg.Namespaced || in.namespaced):
		// Who may write AzureIdentities in one namespace must not borrow what
		// others keep in theirs.
		return fmt.Sprintf("names a secret of namespace %q; an AzureIdentity that is for its own namespace may use that namespace's secrets only", p.SecretNamespace)
	}
	return ""
}

// add appends an identity unless the pod has it already: two bindings may name one. What
// MIC copied into an assignment may be older than the AzureIdentity and have other IDs.
func (p *Pod) add(to *[]Identity, id Identity) {
	same := func(other Identity) bool {
		return other.Namespace == id.Namespace && other.Name == id.Name && other.ClientID == id.ClientID && other.ResourceID == id.ResourceID
	}
	if !slices.ContainsFunc(*to, same) {
		*to = append(*to, id)
	}
}

func (r *Resolver) decideManaged(p *Pod, row *podRow) {
	var unusable []string
	for _, c := range r.candidates(row) {
		if c.why != "" {
			unusable = append(unusable, c.String())
			continue
		}
		p.add(&p.identities, c.Identity)
	}
	p.unusable = some(unusable)
	if len(p.identities) == 0 {
		p.refusal = r.refusal(p, row)
	}
}

func (c candidate) String() string {
	return fmt.Sprintf("AzureIdentityBinding %q names AzureIdentity %q, which %s", c.binding.name, c.binding.identity, c.why)
}

// refusal says why a pod has no identity, in the words of whoever made the objects.
func (r *Resolver) refusal(p *Pod, row *podRow) error {
	label := row.labels[aadpodidentity.BindingLabel]
	switch {
	case p.unusable != "":
		return fmt.Errorf("%w: %s", ErrNoIdentity, p.unusable)
	case label == "":
		return fmt.Errorf("%w: it has no label %q", ErrNoIdentity, aadpodidentity.BindingLabel)
	case r.tables.acrossNamespaces:
		return fmt.Errorf("%w: no AzureIdentityBinding has the selector %q", ErrNoIdentity, label)
	default:
		return fmt.Errorf("%w: no AzureIdentityBinding in namespace %q has the selector %q", ErrNoIdentity, row.namespace, label)
	}
}

// maxListed bounds the objects in one text: whoever may write them makes as many as they
// like.
const maxListed = 10

// some joins the first few sentences of a list.
func some(sentences []string) string {
	if more := len(sentences) - maxListed; more > 0 {
		return fmt.Sprintf("%s; and %d more", strings.Join(sentences[:maxListed], "; "), more)
	}
	return strings.Join(sentences, "; ")
}
