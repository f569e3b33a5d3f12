package status

import (
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/tokencache"
)

// Pod is what a pod gets, and why.
type Pod struct {
	Namespace   string   `json:"namespace"`
	Name        string   `json:"name"`
	Addresses   []string `json:"addresses,omitempty"`
	HostNetwork bool     `json:"hostNetwork,omitempty"`
	Requested   string   `json:"requested,omitempty"` // how the request names an identity; "" if it names none

	State State `json:"state"`
	// Answer describes the response to its requests, if they are refused; Reason is why, a word
	// that stays the same, and Fix is what to do. They may be about a request that was refused
	// just now.
	Answer string `json:"answer,omitempty"`
	Reason string `json:"reason,omitempty"`
	Fix    string `json:"fix,omitempty"`

	Exception  string     `json:"exception,omitempty"`  // that applies
	Identities []Identity `json:"identities,omitempty"` // that it may use, the default first, and those that MIC has yet to assign; the first of them
	Steps      []Step     `json:"steps,omitempty"`      // on the way of a request
	Tokens     []Token    `json:"tokens,omitempty"`     // in memory, those that expire first
	TokensHeld int        `json:"tokensHeld"`
	Refusals   []Refusal  `json:"refusals,omitempty"` // the last first
}

// Identity is an AzureIdentity, or what an annotation of the pod's service account names.
type Identity struct {
	Namespace  string `json:"namespace"`
	Name       string `json:"name"`
	ClientID   string `json:"clientID,omitempty"`
	ResourceID string `json:"resourceID,omitempty"`
	Binding    string `json:"binding,omitempty"`
	Annotated  bool   `json:"annotated,omitempty"` // Namespace and Name are the service account's
	Federated  bool   `json:"federated,omitempty"` // its tokens come by federation, not from IMDS
	Pending    bool   `json:"pending,omitempty"`   // MIC has not assigned it
	Chosen     bool   `json:"chosen,omitempty"`    // the request gets it, or would
	Text       string `json:"text"`                // all of it
}

// Step is a step of a decision; see podresolver.Step.
type Step struct {
	Name  string   `json:"name"`
	State State    `json:"state"`
	Texts []string `json:"texts"`
	Fix   string   `json:"fix,omitempty"`
}

// Token describes a token, without it.
type Token struct {
	Identity        string     `json:"identity"` // client ID or resource ID
	Resource        string     `json:"resource"`
	ExpiresOn       time.Time  `json:"expiresOn"`
	NextRefresh     *time.Time `json:"nextRefresh,omitempty"`
	FailedRefreshes int        `json:"failedRefreshes,omitempty"` // in a row
}

// Refusal is requests that were not served, for one cause.
type Refusal struct {
	Status int       `json:"status"`
	Reason string    `json:"reason"`
	Text   string    `json:"text"`
	Fix    string    `json:"fix,omitempty"`
	Count  uint64    `json:"count"`
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
}

const (
	// maxTokens bounds the tokens that are shown of a pod, which may have hundreds.
	maxTokens = 5
	// maxResource bounds the resource of a token, which the pod chooses: in bytes.
	maxResource = 100
	// maxIdentities bounds those that are shown of a pod, beside the chosen one.
	maxIdentities = 20
	// recently is how long a refusal counts for a pod's state: applications ask again sooner.
	recently = 10 * time.Minute
)

// String is the pod's namespace and name.
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// Pod returns what a request with a selector gets, if the pod sends it. Its error is
// podresolver.ErrUnknownPod or podresolver.ErrNotSynced.
func (p Parts) Pod(namespace, name string, want podresolver.Selector) (Pod, error) {
	return p.pod(namespace, name, want, time.Now())
}

func (p Parts) pod(namespace, name string, want podresolver.Selector, now time.Time) (Pod, error) {
	d, err := p.Pods.Explain(namespace, name, want, p.Confirm)
	if err != nil {
		return Pod{}, err
	}
	pod := Pod{
		Namespace: d.Namespace, Name: d.Name, HostNetwork: d.HostNetwork, Exception: d.Exception,
		Reason: d.Reason, Fix: d.Fix, Identities: identitiesOf(d), State: OK,
	}
	if want != (podresolver.Selector{}) {
		pod.Requested = want.String()
	}
	for _, addr := range d.Addresses {
		pod.Addresses = append(pod.Addresses, addr.String())
	}
	for _, step := range d.Steps {
		pod.Steps = append(pod.Steps, Step{Name: step.Name, State: State(step.State), Texts: step.Texts, Fix: step.Fix})
	}
	if d.Refusal != nil {
		pod.Answer = proxy.Answer(d.Refusal)
		if pod.Reason == "" { // not an error of podresolver
			pod.Reason = proxy.Reason(d.Refusal)
			pod.Fix = proxy.Fix(pod.Reason)
			pod.fixFailed()
		}
	}
	if p.Rules != nil && !d.HostNetwork {
		p.addRules(&pod)
	}
	if p.Server != nil && !d.HostNetwork {
		p.addHistory(&pod, d.Callers)
	}
	pod.judge(d, now)
	return pod, nil
}

// fixFailed gives the step that fails the pod's fix.
func (p *Pod) fixFailed() {
	for i := range p.Steps {
		if p.Steps[i].State == Failed {
			p.Steps[i].Fix = p.Fix
		}
	}
}

// unreached is the answer to requests that do not reach the agent.
const unreached = "nothing: its requests do not reach the agent"

// addRules says if the rules that bring the pod's requests to the agent are not all in place: a fence
// refuses them, if one is.
func (p Parts) addRules(pod *Pod) {
	s := p.Rules()
	if s.Err == nil {
		return
	}
	requests := &pod.Steps[0] // see podresolver.Explain
	reason := s.Problem()
	requests.State, requests.Fix = Warning, s.Fix()
	if inPlace, checked := s.InPlace["redirect"]; checked && !inPlace { // before the first check the last agent's may be
		requests.State, requests.Texts = Failed, nil
		pod.Answer, pod.Reason, pod.Fix = unreached, reason, requests.Fix
	}
	requests.Texts = append(requests.Texts, strings.Split(reason+": "+s.Err.Error(), "\n")...)
}

// addHistory adds what the agent has in memory of the pod's requests.
func (p Parts) addHistory(pod *Pod, addrs []netip.Addr) {
	mayHave := proxy.InUse(p.Pods)
	for _, addr := range addrs {
		held, _ := p.Tokens.HeldBy(addr, math.MaxInt)
		held = slices.DeleteFunc(held, func(h tokencache.Held) bool { return !mayHave(addr, h.Key) }) // an earlier pod's with the address
		pod.TokensHeld += len(held)
		for _, h := range held[:min(len(held), maxTokens)] {
			pod.Tokens = append(pod.Tokens, tokenOf(h))
		}
		for _, r := range p.Server.Refusals(addr) {
			if r.Pod == "" || r.Pod == pod.String() { // not an earlier pod's with the address
				pod.Refusals = append(pod.Refusals, refusalOf(r))
			}
		}
	}
	pod.Tokens = pod.Tokens[:min(len(pod.Tokens), maxTokens)]
}

// judge sets the state. A refusal counts for a pod that is meant to have an identity, or that
// asks for one; one for a reason that is gone by now does not count.
func (p *Pod) judge(d *podresolver.Decision, now time.Time) {
	asked := len(p.Refusals) > 0 && now.Sub(p.Refusals[0].Last) < recently
	var last *Refusal
	never := d.Chosen != nil && p.TokensHeld == 0 // it may have an identity, and has no token of it
	if len(p.Refusals) > 0 && (asked || never) && !decided(p.Refusals[0].Reason) {
		last = &p.Refusals[0]
	}
	switch {
	case d.HostNetwork:
		p.State = None
	case p.Answer != "" && (d.Labelled || asked):
		p.State = Failed
	case p.Answer != "":
		p.State = None
	case last == nil:
	case p.TokensHeld > 0 || p.Exception != "": // it has been served, too
		p.State = Warning
		p.Reason, p.Fix = last.Reason, last.Fix
	default:
		p.State = Failed
		p.Reason, p.Fix = last.Reason, last.Fix
	}
}

// decided reports whether the steps have a reason for as long as it lasts: it follows from the
// cluster's objects and the node's network, and not from the request or the token.
func decided(reason string) bool {
	switch reason {
	case podresolver.RequestedIdentityMissing, podresolver.IdentityUnusable:
		return false
	case proxy.TokensWithheldOnBridge:
		return true
	}
	return slices.Contains(podresolver.Reasons(), reason)
}

func identitiesOf(d *podresolver.Decision) (all []Identity) {
	same := func(a, b podresolver.Identity) bool {
		return a.Namespace == b.Namespace && a.Name == b.Name && a.ClientID == b.ClientID && a.ResourceID == b.ResourceID
	}
	for i, id := range slices.Concat(d.Identities, d.Pending) {
		pending := i >= len(d.Identities)
		if pending && slices.ContainsFunc(d.Identities, func(has podresolver.Identity) bool { return has.Namespace == id.Namespace && has.Name == id.Name }) {
			continue
		}
		chosen := d.Chosen != nil && same(id, *d.Chosen)
		if len(all) >= maxIdentities && !chosen {
			continue
		}
		all = append(all, Identity{
			Namespace: id.Namespace, Name: id.Name, ClientID: id.ClientID, ResourceID: id.ResourceID, Binding: id.Binding,
			Annotated: id.Annotated(), Federated: id.Principal != nil && id.Principal.Federated(),
			Pending: pending, Chosen: chosen, Text: id.String(),
		})
	}
	return all
}

func tokenOf(h tokencache.Held) Token {
	t := Token{Identity: h.Key.ClientID, Resource: h.Key.Resource, ExpiresOn: h.ExpiresOn.UTC(), FailedRefreshes: h.FailedRefreshes}
	if len(t.Resource) > maxResource {
		t.Resource = strings.ToValidUTF8(t.Resource[:maxResource], "") + "…"
	}
	if t.Identity == "" {
		t.Identity = h.Key.ResourceID
	}
	if !h.NextRefresh.IsZero() {
		next := h.NextRefresh.UTC()
		t.NextRefresh = &next
	}
	return t
}

func refusalsOf(in []proxy.Refusal) (out []Refusal) {
	for _, r := range in {
		out = append(out, refusalOf(r))
	}
	return out
}

func refusalOf(r proxy.Refusal) Refusal {
	return Refusal{Status: r.Status, Reason: r.Reason, Text: r.Text, Fix: r.Fix, Count: r.Count, First: r.First.UTC(), Last: r.Last.UTC()}
}
