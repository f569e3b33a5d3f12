package podresolver

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// Decision is what a pod gets and why, for an operator to read.
type Decision struct {
	Pod       string       // namespace/name
	Addresses []netip.Addr // of its status
	// HostNetwork means that what the pod sends does not come to the agent.
	HostNetwork bool
	// Refusal is the error of a request now that names no identity: from Resolve, or from
	// (*Pod).Identity. nil if there is none, and for an excepted pod that is known.
	Refusal error
	// Answer is what the pod is told then, in words that are not this package's; "" is left
	// out.
	Answer     string
	Exception  string     // that applies; "" if none does
	Identities []Identity // that the pod may use, the default first
	Pending    []Identity // that it may use once MIC has assigned them
	Reasons    []string   // a sentence for each object that had a part in it, or nearly had
}

// String is the decision in some lines.
func (d Decision) String() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("pod %s", strings.Join(append([]string{d.Pod}, texts(d.Addresses)...), ", "))
	if d.HostNetwork {
		line("does not ask the agent: it is on the host network, where nothing is redirected, and has what the node has")
	} else if d.Answer != "" {
		line("is answered %s", d.Answer)
	}
	switch {
	case d.HostNetwork:
	case d.Exception != "":
		line("is excepted by %q: what it sends to IMDS is passed on, and it gets what the node gets", d.Exception)
	case len(d.Identities)+len(d.Pending) == 0:
		line("may use no identity")
	}
	for i, id := range d.Identities {
		which := "may use"
		switch {
		case i > 0:
		case d.Refusal == nil:
			which = "gets, unless it names another,"
		case errors.Is(d.Refusal, ErrSeveral):
			which = "may use, if it names it,"
		default:
			which = "would get, unless it names another,"
		}
		line("%s %s", which, id)
	}
	for _, id := range d.Pending {
		if !slices.ContainsFunc(d.Identities, func(has Identity) bool { return has.Namespace == id.Namespace && has.Name == id.Name }) {
			line("will get %s, when MIC has assigned it", id)
		}
	}
	if len(d.Reasons) > 0 {
		line("because")
	}
	for _, reason := range d.Reasons {
		line("- %s", reason)
	}
	return b.String()
}

func texts(addrs []netip.Addr) (all []string) {
	for _, addr := range addrs {
		all = append(all, addr.String())
	}
	return all
}

// String names the identity as its owner would.
func (id Identity) String() string {
	text := fmt.Sprintf("AzureIdentity %s/%s (%s", id.Namespace, id.Name, id.Type)
	if id.ClientID != "" {
		text += ", client ID " + id.ClientID
	}
	if id.ResourceID != "" {
		text += ", " + id.ResourceID
	}
	if p := id.Principal; p != nil {
		text += fmt.Sprintf(", tenant %s, secret %s/%s", p.TenantID, p.SecretNamespace, p.SecretName)
	}
	return text + ")"
}

// Explain says what a pod of the node gets now, and why. confirm is as for ResolveCaller;
// nil confirms every pod. Its error is ErrNotSynced or ErrUnknownPod. It is not for the road
// of requests: it looks at every binding.
func (r *Resolver) Explain(namespace, podName string, confirm func(netip.Addr, *Pod) error) (Decision, error) {
	if !closed(r.synced) {
		return Decision{}, r.notSynced()
	}
	s := r.current.Load()
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	row := r.tables.pods[cache.NewObjectName(namespace, podName)]
	if row == nil {
		return Decision{}, fmt.Errorf("%w: %s/%s", ErrUnknownPod, namespace, podName)
	}
	d := Decision{
		Pod: row.String(), Addresses: row.addrs, HostNetwork: row.hostNetwork,
	}
	say := func(format string, args ...any) { d.Reasons = append(d.Reasons, fmt.Sprintf(format, args...)) }
	p, unserved := r.explainAddresses(s, row, confirm)
	d.Exception, d.Identities, d.Pending = p.exception, p.identities, p.pending
	if row.hostNetwork {
		d.Exception, d.Identities, d.Pending = "", nil, nil
		return d, nil
	}
	if row.workloadIdentity != "" {
		say("it has azure-workload-identity's settings (%s): Azure's SDKs then get their tokens from Entra, and most of them never ask IMDS, and so never this agent", row.workloadIdentity)
	}
	for _, err := range unserved {
		say("%s", err)
	}
	if len(unserved) > 0 {
		d.Refusal = unserved[0]
	} else if p.exception == "" {
		_, d.Refusal = p.Identity(Selector{})
	}
	if errors.Is(d.Refusal, ErrSeveral) {
		say("it has several identities, and with --strict-identity-selection a request must name one")
	}
	r.explainIdentities(p, row, say)
	return d, nil
}

// explainAddresses finds the pod by its addresses, as a request does. unserved has an error
// for each by which it is not found, IPv4 addresses first, since IMDS has no other.
func (r *Resolver) explainAddresses(s *snapshot, row *podRow, confirm func(netip.Addr, *Pod) error) (p *Pod, unserved []error) {
	p = r.decide(row)
	if r.expired.Load() {
		unserved = append(unserved, ErrStale)
	}
	if len(row.addrs) == 0 {
		unserved = append(unserved, fmt.Errorf("%w: its status has none", ErrUnknownAddress))
	}
	addrs := slices.Clone(row.addrs)
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	for _, addr := range addrs {
		found, err := s.resolve(addr, func(p *Pod) error {
			if confirm == nil || p.UID != row.uid {
				return nil
			}
			return confirm(addr, p)
		})
		switch {
		case row.void != "":
			err = fmt.Errorf("%w: %s is not its own any more: %s", ErrUnknownAddress, addr, row.void)
		case err == nil && found.UID == row.uid:
			p = found
		case err == nil:
			err = fmt.Errorf("%w: %s belongs to %s, which is younger", ErrUnconfirmed, addr, found)
		case errors.Is(err, ErrUnknownAddress) && row.expired(time.Now()):
			err = fmt.Errorf("%w: %s is not its own any more: it is being deleted, and its grace period ended at %s", ErrUnknownAddress, addr, row.until.UTC().Format(time.RFC3339))
		}
		if err != nil {
			unserved = append(unserved, err)
		}
	}
	return p, unserved
}

// explainIdentities says what gives identities to a pod, and what nearly does.
func (r *Resolver) explainIdentities(p *Pod, row *podRow, say func(string, ...any)) {
	if p.exception != "" {
		r.explainException(row, p.exception, say)
		return
	}
	if _, ignored := r.exceptionOf(row); ignored != "" {
		say("%s", ignored)
	}
	label := row.labels[aadpodidentity.BindingLabel]
	if label == "" {
		say("it has no label %q", aadpodidentity.BindingLabel)
	}
	bound, given := r.candidates(row), false
	if r.cfg.Mode == Standard {
		for _, a := range r.assignments(row) {
			given = true
			switch _, why := r.assigned(a, row, bound); {
			case why != "":
				say("%s", a.not(why))
			case !a.ready:
				say("AzureAssignedIdentity %s/%s assigns AzureIdentity %s/%s to it, but not yet, or not any more", a.Namespace, a.Name, a.identity.Namespace, a.identity.Name)
			default:
				say("AzureAssignedIdentity %s/%s assigns AzureIdentity %s/%s to it", a.Namespace, a.Name, a.identity.Namespace, a.identity.Name)
			}
		}
	}
	for _, c := range bound {
		given = true
		if c.why != "" {
			say("%s", c)
		} else {
			say("AzureIdentityBinding %q has the selector %q and gives it AzureIdentity %q", c.Binding, label, c.Name)
		}
	}
	if label != "" && !given {
		say("%s", strings.TrimPrefix(r.refusal(p).Error(), ErrNoIdentity.Error()+": "))
	}
	for _, near := range r.nearMisses(row) {
		say("%s", near)
	}
	var all []Identity
	for _, id := range slices.Concat(p.identities, p.pending) {
		all = appendIdentity(all, id)
	}
	for _, id := range all {
		if id.ClientID == "" && len(r.cfg.Deny.ClientIDs) > 0 {
			say("AzureIdentity %q gives no client ID: if its tokens are for one that --deny-identity withholds, the agent hands out none", id.Name)
		}
	}
}

func (r *Resolver) explainException(row *podRow, name string, say func(string, ...any)) {
	for _, e := range r.tables.exceptionsByNS[row.Namespace] {
		if key := matchedLabel(row.labels, e.labels); e.Name == name && key != "" {
			say("AzurePodIdentityException %q lists its label %s=%s", name, key, row.labels[key])
			return
		}
	}
	say("it is a pod of the Deployment mic in namespace %q", row.Namespace)
}
