// Package status shows what the agent knows: its health, its rules, where tokens come from, and what
// each pod gets and why.
//
// The life of a status:
//
//  1. Parts.Snapshot reads each part of the agent once. A Snapshot is plain values, and has no
//     token in it.
//  2. Handler serves it as JSON and as an HTML page; nmi status gets the JSON over the probe
//     socket, and prints a table.
//  3. Pod is the part of it about one pod. nmi explain prints that, for any request that the pod
//     might send, and makes it from the objects of the cluster where no agent answers.
package status

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// Parts are what is known of an agent. Without the agent itself, all but Pods are nil.
type Parts struct {
	Version, Node string
	Mode          podresolver.Mode
	Started       time.Time
	Ready         func() error    // as /readyz
	Notes         func() []string // likewise, of an agent that is ready

	Rules    func() iptables.Status
	Pods     *podresolver.Resolver
	Confirm  func(netip.Addr, *podresolver.Pod) error // see podresolver.Resolver.Explain
	Upstream *upstream.Upstream
	Tokens   *tokencache.Cache
	Server   *proxy.Server
}

// State is how something is.
type State string

// The states.
const (
	OK      State = "ok"
	None    State = "none" // nothing is wrong, and there is nothing
	Warning State = "warning"
	Failed  State = "failed"
)

// Snapshot is what an agent knows at one time.
type Snapshot struct {
	Time        time.Time   `json:"time"`
	Agent       Agent       `json:"agent"`
	Rules       Rules       `json:"rules"`
	Cluster     Cluster     `json:"cluster"`
	Upstream    Upstream    `json:"upstream"`
	Tokens      Tokens      `json:"tokens"`
	Connections Connections `json:"connections"`
	Pods        []Pod       `json:"pods"` // what needs attention first
	// Others are addresses without a pod of this node that have been refused.
	Others []Other `json:"otherAddresses,omitempty"`
}

// Agent is the agent itself.
type Agent struct {
	Version  string    `json:"version"`
	Node     string    `json:"node"`
	Mode     string    `json:"operationMode"`
	Started  time.Time `json:"started"`
	Ready    bool      `json:"ready"`
	Problems []string  `json:"problems,omitempty"` // why it is not ready
	Notes    []string  `json:"notes,omitempty"`
}

// Rules are the redirect, the fences and the rules that are not required.
type Rules struct {
	Mode    string `json:"mode"`
	Reason  string `json:"reason"`            // for the mode
	Backend string `json:"backend,omitempty"` // of iptables; "" if it is not usable
	Error   string `json:"error,omitempty"`   // why required rules are not in place
	Problem string `json:"problem,omitempty"` // the same in a word, see iptables.Status.Problem
	Fix     string `json:"fix,omitempty"`     // what to do
	Parts   []Part `json:"parts,omitempty"`
}

// Part is rules with one purpose, as metrics name them.
type Part struct {
	Name    string `json:"name"`
	InPlace bool   `json:"inPlace"`
}

// Cluster is the data from the API server.
type Cluster struct {
	Synced  bool    `json:"synced"`
	Error   string  `json:"error,omitempty"` // why it is not synced, or may be out of date
	Watches []Watch `json:"watches,omitempty"`
}

// Watch is a resource. SilentSeconds is the time since the API server last sent something about
// it, which it does about once a minute.
type Watch struct {
	Resource      string  `json:"resource"`
	SilentSeconds float64 `json:"silentSeconds"`
}

// Upstream is where tokens come from.
type Upstream struct {
	IMDS           Service    `json:"imds"`
	Entra          Service    `json:"entra"`
	Error          string     `json:"error,omitempty"`          // why IMDS gives no tokens
	ThrottledUntil *time.Time `json:"throttledUntil,omitempty"` // by IMDS
	Shared         bool       `json:"shared,omitempty"`         // another agent of the node has half of the limits
	PerSecond      int        `json:"perSecond"`                // the limits of IMDS; this one also of each of Entra's authorities
	AtOnce         int        `json:"atOnce"`
}

// Service is the requests for tokens to one service.
type Service struct {
	InFlight int `json:"inFlight"`
	Waiting  int `json:"waiting"`
}

// Tokens are the tokens in memory, and the keys without one whose last fetch failed.
type Tokens struct {
	Held    int `json:"held"`
	Failing int `json:"failing"`
}

// Connections are those of pods: open now, and refused and evicted since the start.
type Connections struct {
	Open    int    `json:"open"`
	Busy    int    `json:"busy"`
	Refused uint64 `json:"refused"`
	Evicted uint64 `json:"evicted"`
}

// Other is an address with refusals that is no pod's.
type Other struct {
	Address  string    `json:"address"`
	Refusals []Refusal `json:"refusals"`
}

// partOrder is the order of the parts of Rules.
var partOrder = []string{"redirect", "guard", "routing", "egress", "wireserver", "input", "antispoof"}

// Snapshot reads the parts.
func (p Parts) Snapshot() Snapshot {
	now := time.Now()
	connections, tokens := p.Server.Stats().Connections, p.Tokens.Stats()
	s := Snapshot{
		Time: now.UTC(), Rules: p.rules(), Cluster: p.cluster(), Upstream: p.upstream(now),
		Agent:       Agent{Version: p.Version, Node: p.Node, Mode: string(p.Mode), Started: p.Started.UTC(), Ready: true, Notes: p.Notes()},
		Tokens:      Tokens{Held: tokens.Entries, Failing: tokens.Failing},
		Connections: Connections{Open: connections.Open, Busy: connections.Busy, Refused: connections.Refused, Evicted: connections.Evicted},
	}
	if err := p.Ready(); err != nil {
		s.Agent.Ready, s.Agent.Problems = false, strings.Split(err.Error(), "\n")
	}
	s.Pods = p.pods(now)
	s.Others = p.others(s.Pods)
	return s
}

func (p Parts) rules() Rules {
	status := p.Rules()
	r := Rules{Mode: string(status.Mode), Reason: status.Reason, Backend: string(status.Backend), Error: textOf(status.Err), Problem: status.Problem()}
	r.Fix = status.Fix()
	for name, inPlace := range status.InPlace {
		r.Parts = append(r.Parts, Part{name, inPlace})
	}
	slices.SortFunc(r.Parts, func(a, b Part) int {
		return cmp.Compare(slices.Index(partOrder, a.Name), slices.Index(partOrder, b.Name))
	})
	return r
}

func (p Parts) cluster() Cluster {
	c := Cluster{Synced: p.synced(), Error: textOf(p.Pods.Stale())}
	if err := p.Pods.Ready(); err != nil {
		c.Error = err.Error()
	}
	for _, w := range p.Pods.Stats().Watches {
		c.Watches = append(c.Watches, Watch{w.Resource, w.StaleFor.Seconds()})
	}
	return c
}

func (p Parts) synced() bool {
	select {
	case <-p.Pods.Synced():
		return true
	default:
		return false
	}
}

func (p Parts) upstream(now time.Time) Upstream {
	stats := p.Upstream.Stats()
	u := Upstream{
		IMDS:  Service{InFlight: stats.IMDS.InFlight, Waiting: stats.IMDS.Waiting},
		Entra: Service{InFlight: stats.Entra.InFlight, Waiting: stats.Entra.Waiting},
		Error: textOf(p.Upstream.Unavailable()), Shared: stats.Shared,
	}
	u.PerSecond, u.AtOnce = p.Upstream.Limits()
	if until := p.Upstream.PausedUntil(); until.After(now) {
		until = until.UTC()
		u.ThrottledUntil = &until
	}
	return u
}

// pods are those of the node, what needs attention first.
func (p Parts) pods(now time.Time) []Pod {
	all := []Pod{}
	if !p.synced() {
		return all
	}
	for _, name := range p.Pods.PodNames() {
		if pod, err := p.pod(name.Namespace, name.Name, podresolver.Selector{}, now); err == nil { // else it has gone
			all = append(all, pod)
		}
	}
	urgency := []State{Failed, Warning, OK, None}
	slices.SortFunc(all, func(a, b Pod) int {
		return cmp.Or(cmp.Compare(slices.Index(urgency, a.State), slices.Index(urgency, b.State)),
			cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// others are the refused addresses that none of the pods has.
func (p Parts) others(pods []Pod) (all []Other) {
	known := make(map[string]bool)
	for _, pod := range pods {
		for _, addr := range pod.Addresses {
			known[addr] = true
		}
	}
	for _, caller := range p.Server.RefusedCallers() {
		addr := caller.String()
		if uid := podresolver.UIDOf(caller); uid != "" {
			addr = "UID " + uid
			known[addr] = p.Pods.Owner(caller) != nil
		}
		if !known[addr] {
			all = append(all, Other{addr, refusalsOf(p.Server.Refusals(caller))})
		}
	}
	slices.SortFunc(all, func(a, b Other) int { return cmp.Compare(a.Address, b.Address) })
	return all
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
