package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// decide says what follows from the tables for one pod. The tables are locked.
func (r *Resolver) decide(row *podRow) *Pod {
	p := r.newPod(row)
	exception, ignored := r.exceptionOf(row)
	if p.exception = exception; exception != "" {
		p.refusal = fmt.Errorf("%w: it is excepted", ErrNoIdentity)
		return p
	}
	r.decideIdentities(p)
	if p.refusal != nil && ignored != "" {
		p.refusal = fmt.Errorf("%w; %s", p.refusal, ignored)
	}
	return p
}

func (r *Resolver) newPod(row *podRow) *Pod {
	return &Pod{Namespace: row.Namespace, Name: row.Name, UID: row.uid, Started: row.started, row: row, strict: r.cfg.StrictSelection}
}

// decideIdentities decides for a pod as if no exception applied to it.
func (r *Resolver) decideIdentities(p *Pod) {
	if r.cfg.Mode == Standard {
		r.decideStandard(p)
	} else {
		r.decideManaged(p)
	}
	if len(p.identities)+len(p.pending) == 0 {
		p.refusal = r.refusal(p)
	}
}

// exceptionOf names the exception that applies to a pod, "" if none does; of
// several the first by name. ignored says which one would apply if exceptions of its
// namespace counted.
func (r *Resolver) exceptionOf(row *podRow) (name, ignored string) {
	for _, exception := range r.tables.exceptionsByNS[row.Namespace] {
		if matchedLabel(row.labels, exception.labels) != "" && (name == "" || exception.Name < name) {
			name = exception.Name
		}
	}
	if allowed := r.cfg.ExceptionNamespaces; name != "" && allowed != nil && !slices.Contains(allowed, row.Namespace) {
		ignored = fmt.Sprintf("AzurePodIdentityException %q does not count: namespace %q is not in --exception-namespaces", name, row.Namespace)
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
	bindings := slices.Clone(r.tables.bindingsBySelector[r.tables.key(row.Namespace, label)])
	slices.SortFunc(bindings, preferred)
	found := make([]candidate, 0, len(bindings))
	for _, binding := range bindings {
		id := r.tables.identities[cache.NewObjectName(binding.Namespace, binding.identity)]
		c := candidate{binding: binding}
		switch {
		case id == nil:
			c.why = "does not exist in the binding's namespace"
		case binding.Namespace != row.Namespace && (r.cfg.Namespaced || id.namespaced):
			c.why = "is for pods of its own namespace only"
		default:
			c.Identity, c.why = r.usable(id, binding)
		}
		found = append(found, c)
	}
	return found
}

func preferred(a, b *bindingRow) int {
	return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Namespace, b.Namespace))
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
		Namespace: in.Namespace, Name: in.Name, Type: in.kind,
		ClientID: in.clientID, ResourceID: in.resourceID, Binding: binding.Name,
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
	case p.SecretNamespace != in.Namespace && (r.cfg.Mode != Standard || r.cfg.Namespaced || in.namespaced):
		// Who may write AzureIdentities in one namespace must not borrow what
		// others keep in theirs.
		return fmt.Sprintf("names a secret of namespace %q; an AzureIdentity that is for its own namespace may use that namespace's secrets only", p.SecretNamespace)
	}
	return ""
}

// appendIdentity appends an identity unless it is there already: two bindings may name one.
// What MIC copied into an assignment may be older than the AzureIdentity and have other IDs.
func appendIdentity(to []Identity, id Identity) []Identity {
	same := func(other Identity) bool {
		return other.Namespace == id.Namespace && other.Name == id.Name && other.ClientID == id.ClientID && other.ResourceID == id.ResourceID
	}
	if slices.ContainsFunc(to, same) {
		return to
	}
	return append(to, id)
}

func (r *Resolver) decideManaged(p *Pod) {
	var unusable []string
	for _, c := range r.candidates(p.row) {
		if c.why != "" {
			unusable = append(unusable, c.String())
			continue
		}
		p.identities = appendIdentity(p.identities, c.Identity)
	}
	p.unusable = some(unusable)
}

func (c candidate) String() string {
	return fmt.Sprintf("AzureIdentityBinding %q names AzureIdentity %q, which %s", c.binding.Name, c.binding.identity, c.why)
}

// refusal says why a pod has no identity, in the words of whoever made the objects.
func (r *Resolver) refusal(p *Pod) error {
	label := p.row.labels[aadpodidentity.BindingLabel]
	switch {
	case p.unusable != "":
		return fmt.Errorf("%w: %s", ErrNoIdentity, p.unusable)
	case label == "":
		return fmt.Errorf("%w: it has no label %q", ErrNoIdentity, aadpodidentity.BindingLabel)
	case r.tables.acrossNamespaces:
		return fmt.Errorf("%w: no AzureIdentityBinding has the selector %q", ErrNoIdentity, label)
	default:
		return fmt.Errorf("%w: no AzureIdentityBinding in namespace %q has the selector %q", ErrNoIdentity, p.Namespace, label)
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
