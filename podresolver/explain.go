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
	Namespace, Name string
	Addresses       []netip.Addr // of its status
	Callers         []netip.Addr // that its requests come from, as bounds and refusals have them; see ByUID
	// HostNetwork means that the pod's requests are not redirected to the agent.
	HostNetwork bool
	// Labelled means that somebody wants the pod to have an identity: it has the label of
	// bindings, or its service account is annotated.
	Labelled bool
	// Refusal is the error that a request with the selector gets now, from Resolve or
	// (*Pod).Identity. It is nil if there is none, and for an excepted pod that resolves.
	// Reason is its reason, see Reason, and Fix what to do about it.
	Refusal     error
	Reason, Fix string
	Exception   string     // name of the exception that applies; "" for none
	Chosen      *Identity  // that the request gets, or would get but for its address; nil for none
	Identities  []Identity // that the pod may use, the default first
	Pending     []Identity // that it may use once MIC has assigned them
	Steps       []Step     // on the way of a request, in its order
}

// State is how a step went.
type State string

// States of a step.
const (
	OK      State = "ok"
	Warning State = "warning" // the request is served, but perhaps not as somebody intends
	Failed  State = "failed"  // the request is refused for it
)

// Step is a step of a decision.
type Step struct {
	Name  string
	State State
	Texts []string // a sentence for each object that matters, or nearly matches
	Fix   string   // what to do; "" for nothing
}

// Names of steps. Those after a step in which the request leaves the agent are left out.
const (
	stepRequests   = "requests"
	stepData       = "data" // if it may be out of date
	stepAddress    = "address"
	stepException  = "exception"
	stepBinding    = "binding"
	stepAssignment = "assignment" // in Standard mode
	stepAccount    = "account"    // the service account's annotations, with Federation.ServiceAccounts
	stepIdentity   = "identity"
)

// String is the pod's namespace and name.
func (d *Decision) String() string { return d.Namespace + "/" + d.Name }

// maxTexts bounds the texts of a step, whose number authors of bindings have a say in.
const maxTexts = 2 * maxDescribed

// add adds a step.
func (d *Decision) add(name string, state State, fix string, texts ...string) {
	if more := len(texts) - maxTexts; more > 0 {
		texts = append(texts[:maxTexts:maxTexts], fmt.Sprintf("and %d more", more))
	}
	d.Steps = append(d.Steps, Step{Name: name, State: state, Texts: texts, Fix: fix})
}

// object names the object that gives the identity.
func (id Identity) object() string {
	kind := "AzureIdentity"
	if id.Annotated() {
		kind = "ServiceAccount"
	}
	return fmt.Sprintf("%s %s/%s", kind, id.Namespace, id.Name)
}

// String describes the identity for a log line or explanation.
func (id Identity) String() string {
	if id.Annotated() {
		return fmt.Sprintf("%s (federated, client ID %s, tenant %s)", id.object(), id.ClientID, id.Principal.TenantID)
	}
	text := fmt.Sprintf("%s (%s", id.object(), id.Type)
	if id.ClientID != "" {
		text += ", client ID " + id.ClientID
	}
	if id.ResourceID != "" {
		text += ", " + id.ResourceID
	}
	switch p := id.Principal; {
	case p == nil:
	case p.Federated():
		text += fmt.Sprintf(", tenant %s, federated by ServiceAccount %s/%s", p.TenantID, p.ServiceAccount.Namespace, p.ServiceAccount.Name)
	default:
		text += fmt.Sprintf(", tenant %s, secret %s/%s", p.TenantID, p.SecretNamespace, p.SecretName)
	}
	return text + ")"
}

// Explain returns what a request with a selector gets now, if a pod of the node sends it, and
// why. confirm is as for ResolveCaller; nil confirms every pod. Its error is ErrNotSynced or
// ErrUnknownPod. It looks at every binding, and is too slow for requests.
func (r *Resolver) Explain(namespace, podName string, want Selector, confirm func(netip.Addr, *Pod) error) (*Decision, error) {
	if !closed(r.synced) {
		return nil, r.notSynced()
	}
	stale := r.Stale()
	s := r.current.Load()
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	info := r.objects.pods[cache.NewObjectName(namespace, podName)]
	if info == nil {
		return nil, fmt.Errorf("%w: %s/%s", ErrUnknownPod, namespace, podName)
	}
	d := &Decision{
		Namespace: info.Namespace, Name: info.Name, Addresses: info.addrs, Callers: info.addrs,
		Labelled: info.labels[aadpodidentity.BindingLabel] != "" || r.annotationsLocked(info) != nil,
	}
	byUID := info.caller.IsValid()
	decided := r.decideLocked(info)
	d.HostNetwork = info.hostNetwork && (!byUID || !r.cfg.HostNetworkAll && !decided.bound())
	if d.explainRequests(info); d.HostNetwork {
		return d, nil
	}
	if stale != nil && !r.expired.Load() {
		d.add(stepData, Warning, "do what is said of each resource; until then changes of it count for nothing", strings.Split("it may be out of date: "+stale.Error(), "\n")...)
	}
	var p *Pod
	if byUID {
		d.Callers = []netip.Addr{info.caller}
		p = r.explainUID(d, s, decided)
	} else {
		p = r.explainAddressesLocked(d, s, info, confirm)
	}
	d.Exception, d.Identities, d.Pending = p.exception, p.identities, p.pending
	if r.explainExceptionLocked(d, info); p.exception != "" {
		return d, nil
	}
	r.explainIdentitiesLocked(d, p, want)
	return d, nil
}

// PodNames returns the names of the node's pods, in any order.
func (r *Resolver) PodNames() (names []cache.ObjectName) {
	r.objects.mu.Lock()
	defer r.objects.mu.Unlock()
	for name := range r.objects.pods {
		names = append(names, name)
	}
	return names
}

// explainRequests says whether the pod's requests come to the agent.
func (d *Decision) explainRequests(info *podInfo) {
	switch {
	case d.HostNetwork && info.caller.IsValid():
		d.add(stepRequests, Warning, "if it is to have an identity of its own, bind one to it",
			"it is on the host network, and nothing is bound to it: its requests go to IMDS directly, which gives it the identities of the node (with --host-network-pods=bound they are refused)")
	case d.HostNetwork:
		d.add(stepRequests, Warning, "if it is to have an identity of its own, run it without hostNetwork",
			"it is on the host network: its requests go to IMDS directly, which gives it the identities of the node")
	case info.workloadIdentity != "":
		d.add(stepRequests, Warning, "if it is to get its tokens here, take it out of Azure Workload Identity",
			fmt.Sprintf("it is set up for Azure Workload Identity (%s): most Azure SDKs then get tokens from Entra, and never send requests to IMDS or this agent", info.workloadIdentity))
	default:
		if info.caller.IsValid() {
			d.add(stepRequests, OK, "", "its connections to IMDS are redirected to the agent")
			return
		}
		d.add(stepRequests, OK, "", "it is on the pod network, where requests to IMDS are redirected to the agent")
	}
}

// explainUID is explainAddressesLocked for a pod that is known by its UID.
func (r *Resolver) explainUID(d *Decision, s *snapshot, p *Pod) *Pod {
	found, err := s.resolve(p.info.caller, func(*Pod) error { return nil })
	if r.expired.Load() {
		err = ErrStale
	}
	if err != nil {
		why := causeOf(err)
		d.refuse(err, why)
		d.add(stepAddress, Failed, why.fix, err.Error())
		return p
	}
	d.add(stepAddress, OK, "", "the kernel names it by its cgroup (UID "+UIDOf(p.info.caller)+"), whatever its address is")
	return found
}

// explainAddressesLocked resolves the pod's addresses, as a request does. The first that does not
// resolve to the pod is the refusal, of IPv4 addresses first, because IMDS has no IPv6 address.
func (r *Resolver) explainAddressesLocked(d *Decision, s *snapshot, info *podInfo, confirm func(netip.Addr, *Pod) error) (p *Pod) {
	p = r.decideLocked(info)
	var unserved []error
	if r.expired.Load() {
		unserved = append(unserved, ErrStale)
	}
	if len(info.addrs) == 0 {
		unserved = append(unserved, fmt.Errorf("%w: its status has no address", ErrUnknownAddress))
	}
	addrs := slices.Clone(info.addrs)
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	var own []string
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
			own = append(own, addr.String())
		case err == nil:
			err = fmt.Errorf("%w: %s belongs to %s, which is newer", ErrUnconfirmed, addr, found)
		case errors.Is(err, ErrUnknownAddress) && info.expired(time.Now()):
			err = fmt.Errorf("%w: %s no longer belongs to it: it is being deleted, and its grace period ended at %s", ErrUnknownAddress, addr, info.until.UTC().Format(time.RFC3339))
		}
		if err != nil {
			unserved = append(unserved, err)
		}
	}
	if len(unserved) == 0 {
		d.add(stepAddress, OK, "", strings.Join(own, " and ")+" is its own")
		return p
	}
	why := causeOf(unserved[0])
	if info.noClaim != "" || info.expired(time.Now()) {
		why.fix = "nothing: the pod is at its end"
	}
	d.refuse(unserved[0], why)
	var texts []string
	for _, err := range unserved {
		texts = append(texts, err.Error())
	}
	d.add(stepAddress, Failed, why.fix, texts...)
	return p
}

// refuse notes the first error that a request meets.
func (d *Decision) refuse(err error, why cause) {
	if d.Refusal == nil {
		d.Refusal, d.Reason, d.Fix = err, why.reason, why.fix
	}
}

func (r *Resolver) explainExceptionLocked(d *Decision, info *podInfo) {
	if d.Exception != "" {
		texts := []string{fmt.Sprintf("it is excepted by %q: its requests are passed through to IMDS, which gives it the identities of the node", d.Exception)}
		for _, e := range r.objects.exceptionsByNS[info.Namespace] {
			if key := matchedLabel(info.labels, e.labels); e.Name == d.Exception && key != "" {
				texts = append(texts, fmt.Sprintf("AzurePodIdentityException %q lists its label %s=%s", d.Exception, key, info.labels[key]))
			}
		}
		if d.Exception == micException {
			texts = append(texts, fmt.Sprintf("it is a pod of the Deployment mic in namespace %q", info.Namespace))
		}
		d.add(stepException, OK, "", texts...)
		return
	}
	state, fix := OK, ""
	var texts []string
	if _, ignored := r.exceptionLocked(info); ignored != "" {
		texts = append(texts, ignored)
		state, fix = Warning, fmt.Sprintf("if it is to have the identities of the node, add %s to --exception-namespaces", info.Namespace)
	}
	for _, near := range r.nearExceptionsLocked(info) {
		texts = append(texts, near.text)
		if near.fix != "" && fix == "" {
			state, fix = Warning, "if it is to have the identities of the node, "+near.fix
		}
	}
	if len(texts) == 0 {
		texts = []string{"none applies"}
	}
	d.add(stepException, state, fix, texts...)
}
