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

// Decision is what a pod gets and why, for an operator.
type Decision struct {
	Pod       string       // namespace/name
	Addresses []netip.Addr // of its status
	// HostNetwork means that the pod's requests are not redirected to the agent.
	HostNetwork bool
	// Refusal is the error that a request without a selector gets now, from Resolve or
	// (*Pod).Identity. It is nil if there is none, and for an excepted pod that resolves.
	Refusal error
	// Answer describes the response to such a request. The caller sets it; "" is left out.
	Answer     string
	Exception  string     // name of the exception that applies; "" for none
	Identities []Identity // that the pod may use, the default first
	Pending    []Identity // that it may use once MIC has assigned them
	Reasons    []string   // a sentence for each object that matters, or nearly matches
}

// String is the text that nmi explain prints.
func (d Decision) String() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("pod %s", strings.Join(append([]string{d.Pod}, texts(d.Addresses)...), ", "))
	if d.HostNetwork {
		line("is on the host network: its requests go to IMDS directly, which gives it the identities of the node")
	} else if d.Answer != "" {
		line("is answered %s", d.Answer)
	}
	switch {
	case d.HostNetwork:
	case d.Exception != "":
		line("is excepted by %q: its requests are passed through to IMDS, which gives it the identities of the node", d.Exception)
	case len(d.Identities)+len(d.Pending) == 0:
		line("has no identity")
	}
	for i, id := range d.Identities {
		which := "may use"
		switch {
		case i > 0:
		case d.Refusal == nil:
			which = "gets by default"
		case errors.Is(d.Refusal, ErrMultipleIdentities):
			which = "may use, if requested by ID,"
		default:
			which = "would get by default"
		}
		line("%s %s", which, id)
	}
	for _, id := range d.Pending {
		if !slices.ContainsFunc(d.Identities, func(has Identity) bool { return has.Namespace == id.Namespace && has.Name == id.Name }) {
			line("will get %s once MIC has assigned it", id)
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

// String describes the identity for a log line or explanation.
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

// Explain returns what a pod of the node gets now, and why. confirm is as for ResolveCaller;
// nil confirms every pod. Its error is ErrNotSynced or ErrUnknownPod. It looks at every
// binding, and is too slow for requests.
func (r *Resolver) Explain(namespace, podName string, confirm func(netip.Addr, *Pod) error) (Decision, error) {
	if !closed(r.synced) {
		return Decision{}, r.notSynced()
	}
	s := r.current.Load()
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	info := r.objects.pods[cache.NewObjectName(namespace, podName)]
	if info == nil {
		return Decision{}, fmt.Errorf("%w: %s/%s", ErrUnknownPod, namespace, podName)
	}
	d := Decision{
		Pod: info.String(), Addresses: info.addrs, HostNetwork: info.hostNetwork,
	}
	say := func(format string, args ...any) { d.Reasons = append(d.Reasons, fmt.Sprintf(format, args...)) }
	p, unserved := r.explainAddressesLocked(s, info, confirm)
	d.Exception, d.Identities, d.Pending = p.exception, p.identities, p.pending
	if info.hostNetwork {
		d.Exception, d.Identities, d.Pending = "", nil, nil
		return d, nil
	}
	if info.workloadIdentity != "" {
		say("it is set up for Azure Workload Identity (%s): most Azure SDKs then get tokens from Entra, and never send requests to IMDS or this agent", info.workloadIdentity)
	}
	for _, err := range unserved {
		say("%s", err)
	}
	if len(unserved) > 0 {
		d.Refusal = unserved[0]
	} else if p.exception == "" {
		_, d.Refusal = p.Identity(Selector{})
	}
	if errors.Is(d.Refusal, ErrMultipleIdentities) {
		say("it has several identities, and with --strict-identity-selection a request must name one")
	}
	r.explainIdentitiesLocked(p, info, say)
	return d, nil
}

// explainAddressesLocked resolves the pod's addresses, as a request does. unserved has an error
// for each address that does not resolve to the pod, IPv4 addresses first, because IMDS has no
// IPv6 address.
func (r *Resolver) explainAddressesLocked(s *snapshot, info *podInfo, confirm func(netip.Addr, *Pod) error) (p *Pod, unserved []error) {
	p = r.decideLocked(info)
	if r.expired.Load() {
		unserved = append(unserved, ErrStale)
	}
	if len(info.addrs) == 0 {
		unserved = append(unserved, fmt.Errorf("%w: its status has no address", ErrUnknownAddress))
	}
	addrs := slices.Clone(info.addrs)
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	for _, addr := range addrs {
		found, err := s.resolve(addr, func(p *Pod) error {
			if confirm == nil || p.UID != info.uid {
				return nil
			}
			return confirm(addr, p)
		})
		switch {
		case info.noClaim != "":
			err = fmt.Errorf("%w: %s no longer belongs to it: %s", ErrUnknownAddress, addr, info.noClaim)
		case err == nil && found.UID == info.uid:
			p = found
		case err == nil:
			err = fmt.Errorf("%w: %s belongs to %s, which is newer", ErrUnconfirmed, addr, found)
		case errors.Is(err, ErrUnknownAddress) && info.expired(time.Now()):
			err = fmt.Errorf("%w: %s no longer belongs to it: it is being deleted, and its grace period ended at %s", ErrUnknownAddress, addr, info.until.UTC().Format(time.RFC3339))
		}
		if err != nil {
			unserved = append(unserved, err)
		}
	}
	return p, unserved
}

// explainIdentitiesLocked describes what gives a pod its identities, and what nearly does.
func (r *Resolver) explainIdentitiesLocked(p *Pod, info *podInfo, say func(string, ...any)) {
	if p.exception != "" {
		r.explainExceptionLocked(info, p.exception, say)
		return
	}
	if _, ignored := r.exceptionLocked(info); ignored != "" {
		say("%s", ignored)
	}
	label := info.labels[aadpodidentity.BindingLabel]
	if label == "" {
		say("it has no label %q", aadpodidentity.BindingLabel)
	}
	bound, given := r.candidatesLocked(info), false
	if r.cfg.Mode == Standard {
		for _, a := range r.assignmentsLocked(info) {
			given = true
			switch _, why := r.fromAssignment(a, info, bound); {
			case why != "":
				say("%s", a.describe(why))
			case !a.assigned:
				say("AzureAssignedIdentity %s is for AzureIdentity %s, but its state is not Assigned", a.ObjectName, a.identity.ObjectName)
			default:
				say("AzureAssignedIdentity %s assigns AzureIdentity %s to it", a.ObjectName, a.identity.ObjectName)
			}
		}
	}
	for _, c := range bound {
		given = true
		if c.unusable != "" {
			say("%s", c)
		} else {
			say("AzureIdentityBinding %q has the selector %q and gives it AzureIdentity %q", c.Binding, label, c.Name)
		}
	}
	if label != "" && !given {
		say("%s", strings.TrimPrefix(r.refusal(p).Error(), ErrNoIdentity.Error()+": "))
	}
	for _, near := range r.nearMissesLocked(info) {
		say("%s", near)
	}
	var all []Identity
	for _, id := range slices.Concat(p.identities, p.pending) {
		all = appendIdentity(all, id)
	}
	for _, id := range all {
		if id.ClientID == "" && len(r.cfg.Deny.ClientIDs) > 0 {
			say("AzureIdentity %q has no client ID; if its tokens are for a client ID in --deny-identity, requests for them are refused", id.Name)
		}
	}
}

func (r *Resolver) explainExceptionLocked(info *podInfo, name string, say func(string, ...any)) {
	for _, e := range r.objects.exceptionsByNS[info.Namespace] {
		if key := matchedLabel(info.labels, e.labels); e.Name == name && key != "" {
			say("AzurePodIdentityException %q lists its label %s=%s", name, key, info.labels[key])
			return
		}
	}
	say("it is a pod of the Deployment mic in namespace %q", info.Namespace)
}
