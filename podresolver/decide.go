package podresolver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Functions that end in Locked need r.objects locked.

// decideLocked makes the decision for a pod.
func (r *Resolver) decideLocked(info *podInfo) *Pod {
	p := r.newPod(info)
	exception, ignored := r.exceptionLocked(info)
	if p.exception = exception; exception != "" {
		p.refusal = fmt.Errorf("%w: it is excepted", ErrNoIdentity)
		return p
	}
	r.decideIdentitiesLocked(p)
	if p.refusal != nil && ignored != "" {
		p.refusal = fmt.Errorf("%w; %s", p.refusal, ignored)
	}
	return p
}

func (r *Resolver) newPod(info *podInfo) *Pod {
	return &Pod{Namespace: info.Namespace, Name: info.Name, UID: info.uid, Started: info.started, info: info, strict: r.cfg.StrictSelection}
}

// decideIdentitiesLocked decides for a pod as if no exception applied to it.
func (r *Resolver) decideIdentitiesLocked(p *Pod) {
	if r.cfg.Mode == Standard {
		r.decideStandardLocked(p)
	} else {
		r.decideManagedLocked(p)
	}
	matched := len(p.identities)+len(p.pending)+len(r.candidatesLocked(p.info)) > 0
	r.addAnnotatedLocked(p, matched)
	if len(p.defaults)+len(p.pending) == 0 && (p.late == nil || matched) {
		p.refusal = r.refusal(p)
	}
	p.foreign = r.cfg.Mode == Standard && r.foreignLocked(p.info)
}

// foreignLocked is Pod.Foreign.
func (r *Resolver) foreignLocked(info *podInfo) bool {
	return slices.ContainsFunc(r.candidatesLocked(info), func(c candidate) bool { return c.binding.Namespace != info.Namespace }) ||
		slices.ContainsFunc(r.assignmentsLocked(info), func(a *assignmentInfo) bool {
			return a.identity.Namespace != info.Namespace || a.Namespace != info.Namespace && a.Namespace != micAssignments
		})
}

// exceptionLocked returns the name of the exception that applies to a pod, "" if none does; of
// several the first by name. ignored is why one does not apply that otherwise would.
func (r *Resolver) exceptionLocked(info *podInfo) (name, ignored string) {
	for _, exception := range r.objects.exceptionsByNS[info.Namespace] {
		if matchedLabel(info.labels, exception.labels) != "" && (name == "" || exception.Name < name) {
			name = exception.Name
		}
	}
	if allowed := r.cfg.ExceptionNamespaces; name != "" && allowed != nil && !slices.Contains(allowed, info.Namespace) {
		ignored = fmt.Sprintf("AzurePodIdentityException %q is ignored: namespace %q is not in --exception-namespaces", name, info.Namespace)
		name = ""
	}
	if name == "" && info.mic {
		name = micException
	}
	return name, ignored
}

// micException stands for the exception of MIC's own pods, which needs no object.
const micException = "(MIC's own)"

// matchedLabel returns the key of a wanted label that the pod has, the first by name, or "".
// Keys are case-sensitive, values are not, as in the old NMI.
func matchedLabel(have, want map[string]string) (matched string) {
	for key, wanted := range want {
		if value, ok := have[key]; ok && strings.EqualFold(value, wanted) && (matched == "" || key < matched) {
			matched = key
		}
	}
	return matched
}

// candidate is an identity that a binding gives to a pod.
type candidate struct {
	Identity
	binding  *bindingInfo
	missing  bool   // there is no such AzureIdentity
	unusable string // why the pod cannot use it; "" if it can
}

func (c candidate) String() string {
	return fmt.Sprintf("AzureIdentityBinding %q names AzureIdentity %q, which %s", c.binding.Name, c.binding.identity, c.unusable)
}

// candidatesLocked are the identities that bindings give to a pod, in order of preference: the
// oldest binding first, then by name. The first is the pod's default, so the order has to be
// the same on every node and after every restart.
func (r *Resolver) candidatesLocked(info *podInfo) []candidate {
	label := info.labels[aadpodidentity.BindingLabel]
	if label == "" {
		return nil // an empty selector matches no pod
	}
	bindings := slices.Clone(r.objects.bindingsBySelector[r.objects.key(info.Namespace, label)])
	slices.SortFunc(bindings, compareBindings)
	candidates := make([]candidate, 0, len(bindings))
	for _, binding := range bindings {
		id := r.objects.identities[cache.NewObjectName(binding.Namespace, binding.identity)]
		c := candidate{binding: binding}
		switch {
		case id == nil:
			c.missing, c.unusable = true, "does not exist in the binding's namespace"
		case binding.Namespace != info.Namespace && (r.cfg.Namespaced || id.namespaced):
			c.unusable = "is limited to pods of its own namespace"
		default:
			c.Identity, c.unusable = r.newIdentityLocked(id, binding, info)
		}
		candidates = append(candidates, c)
	}
	return candidates
}

func compareBindings(a, b *bindingInfo) int {
	return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Namespace, b.Namespace))
}

// newIdentityLocked makes an Identity of an AzureIdentity for a pod, or returns why it is unusable.
func (r *Resolver) newIdentityLocked(in *identityInfo, binding *bindingInfo, pod *podInfo) (_ Identity, unusable string) {
	var principal *Principal
	federated, malformed := in.isFederated()
	switch {
	case in.unreadable != "":
		unusable = "is malformed: " + in.unreadable
	case malformed != "":
		unusable = malformed
	case federated:
		principal, unusable = r.federatedLocked(in, pod)
	case in.kind == aadpodidentity.ServicePrincipal, in.kind == aadpodidentity.ServicePrincipalCertificate:
		principal, unusable = in.principal, r.checkPrincipal(in)
	case in.kind != aadpodidentity.UserAssignedMSI:
		unusable = fmt.Sprintf("has the unknown type %d", in.kind)
	case in.clientID == "" && in.resourceID == "":
		// IMDS would return a token of the node's own identity.
		unusable = "has neither clientID nor resourceID"
	default:
		unusable = checkResourceID(in.resourceID)
	}
	unusable = cmp.Or(unusable, checkClientID(in.clientID), r.cfg.Deny.reason(in))
	if unusable != "" {
		return Identity{}, unusable
	}
	return Identity{
		Namespace: in.Namespace, Name: in.Name, Type: in.kind,
		ClientID: in.clientID, ResourceID: in.resourceID, Binding: binding.Name,
		Principal: principal,
	}, ""
}

// maxAuxiliaryTenants bounds how many tokens one request fetches from Entra. Azure Resource
// Manager accepts at most three ("Authenticate requests across tenants").
const maxAuxiliaryTenants = 10

// checkPrincipal is why a service principal is unusable, "" if it is usable.
func (r *Resolver) checkPrincipal(in *identityInfo) string {
	switch p := in.principal; {
	case in.clientID == "":
		return "has no clientID"
	case p.TenantID == "":
		return "has no tenantID"
	case p.SecretName == "":
		return "has no secret name in clientPassword"
	case len(p.AuxiliaryTenantIDs) > maxAuxiliaryTenants:
		return fmt.Sprintf("has %d auxiliaryTenantIDs, more than %d", len(p.AuxiliaryTenantIDs), maxAuxiliaryTenants)
	case p.SecretNamespace != in.Namespace && (r.cfg.Mode != Standard || r.cfg.Namespaced || in.namespaced):
		// Authors of AzureIdentities in one namespace must not get at the secrets of others.
		return fmt.Sprintf("names a secret in namespace %q; a namespaced AzureIdentity may use secrets of its own namespace only", p.SecretNamespace)
	}
	return ""
}

// maxIdentities is how many identities a pod can have by bindings, the oldest first. Who may create
// bindings could have the agent of each node use up its memory otherwise. Those of its own namespace
// count apart from those of others, whose authors could keep it from its own otherwise.
const maxIdentities = 100

// appendIdentity appends an identity unless it is there already, because two bindings name it, or there
// are maxIdentities.
// What MIC copied into an assignment may be older than the AzureIdentity and have other IDs.
func appendIdentity(to []Identity, id Identity, namespace string) []Identity {
	same := func(other Identity) bool {
		return other.Namespace == id.Namespace && other.Name == id.Name && other.ClientID == id.ClientID && other.ResourceID == id.ResourceID
	}
	own, alike := id.Namespace == namespace, 0
	for _, other := range to {
		if same(other) {
			return to
		}
		if (other.Namespace == namespace) == own {
			alike++
		}
	}
	if alike == maxIdentities {
		return to
	}
	return append(to, id)
}

func (r *Resolver) decideManagedLocked(p *Pod) {
	var unusable []string
	for _, c := range r.candidatesLocked(p.info) {
		if c.unusable != "" {
			unusable = append(unusable, c.String())
			continue
		}
		p.identities = appendIdentity(p.identities, c.Identity, p.Namespace)
	}
	p.unusable = joinFirst(unusable)
}

// refusal is why a pod has no identity.
func (r *Resolver) refusal(p *Pod) error {
	if p.unusable != "" {
		return fmt.Errorf("%w: %s", ErrNoIdentity, p.unusable)
	}
	err := fmt.Errorf("%w: %s", ErrNoIdentity, r.unbound(p))
	if p.account != "" {
		err = fmt.Errorf("%w; %s", err, p.account)
	}
	return err
}

// unbound is why no binding gives a pod anything.
func (r *Resolver) unbound(p *Pod) string {
	switch label := p.info.labels[aadpodidentity.BindingLabel]; {
	case label == "":
		return fmt.Sprintf("it has no label %q", aadpodidentity.BindingLabel)
	case r.objects.acrossNamespaces:
		return fmt.Sprintf("no AzureIdentityBinding has the selector %q", label)
	default:
		return fmt.Sprintf("no AzureIdentityBinding in namespace %q has the selector %q", p.Namespace, label)
	}
}

// maxDescribed bounds how many objects one text describes: their authors can create any number.
const maxDescribed = 10

// joinFirst joins the first few sentences.
func joinFirst(sentences []string) string {
	if more := len(sentences) - maxDescribed; more > 0 {
		return fmt.Sprintf("%s; and %d more", strings.Join(sentences[:maxDescribed], "; "), more)
	}
	return strings.Join(sentences, "; ")
}
