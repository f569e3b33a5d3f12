// Package conformance says what a metadata service must do on the wire for the
// clients that exist, case by case, and checks whether one does.
//
// The life of a run: Cases is the table. Run takes each case in turn: where the
// Target cannot give what the case needs, the case is not run and the result says
// what it needs; otherwise the case sends requests, byte for byte over sockets of
// its own, and what it notes about the answers is its result. WriteText and
// WriteMarkdown print the results.
//
// A Target is a base URL and who asks, which is all that there is on a virtual
// machine of Azure's, and what a test can arrange around the service on top of
// that: its Stage.
package conformance

import (
	"context"
	"net"
	"slices"
	"strings"
)

// Mark says how it is known what must happen.
type Mark string

// The marks. Only Policy is not what the real service does.
const (
	Wire       Mark = "W" // captured from the real service
	Documented Mark = "D" // Microsoft's documentation, or an RFC
	SDK        Mark = "S" // read in the source of an SDK
	Observed   Mark = "O" // SDKs were run, and did so
	Policy     Mark = "P" // the agent's own, where the real service gives more
)

// Case is one thing that a metadata service must do.
type Case struct {
	Number int
	Name   string
	Mark   Mark
	Source string // the page, or the SDK, or the reason of a policy
	Sends  string // in words; R is a valid request for a token
	Needs  []Need // beyond an answering service

	check func(*conversation)
}

// Caller is somebody who sends requests, and an identity that it may use.
type Caller struct {
	Dial func(context.Context) (net.Conn, error)
	// How the identity can be named; "" where that is not known.
	ClientID, ObjectID, ResourceID string
}

// Target is the service to be tested.
type Target struct {
	// Caller sends all requests, save those of cases that say otherwise.
	Caller
	// NameIdentity makes every valid request name ClientID: a machine that has
	// several identities must be told.
	NameIdentity bool
	Host         string // for the Host header
	Resource     string // that the caller can have tokens for
	// UnknownResource is one that Entra does not know; "" if nobody would ask Entra.
	UnknownResource string
	// Subject says whose token it is, by client ID, or "" if that cannot be told.
	// nil reads a JWT.
	Subject func(token string) string
	// Stage is what can be arranged. Of the zero Stage: nothing.
	Stage Stage
}

// Stage arranges what a URL alone cannot give. What a nil field would arrange
// cannot be had.
type Stage struct {
	// Unbound is a caller that has no identity, and will not get one.
	Unbound func(context.Context) (Caller, error)
	// Several is a caller with several identities where the service insists that
	// one be named.
	Several func(context.Context) (Caller, error)
	// Neighbour is a caller with another identity than the Target's.
	Neighbour func(context.Context) (Caller, error)
	// Pending is a caller whose identity is on its way.
	Pending func(context.Context) (Pending, error)
	// Upstream lists the requests that have reached the service behind the agent:
	// their targets, raw. The list only grows.
	Upstream func() []string
	// Fault makes the service behind the agent answer the next token request so.
	Fault func(Fault)
	// Clients runs the SDKs, and says which of them fail.
	Clients func(context.Context) error
}

// Pending is a caller whose identity is on its way.
type Pending struct {
	Caller
	Assign func(context.Context) error // lets the identity arrive
	Done   func() error                // is called at the end
}

// Fault is an answer instead of a token.
type Fault struct {
	Status     int
	Body       string
	RetryAfter string // header; "" for none
}

// Need is something without which a case cannot be run. Its text ends the
// sentence "not run: needs".
type Need string

// The needs.
const (
	ClientID       Need = "the client ID of the caller's identity"
	ResourceID     Need = "the resource ID of the caller's identity"
	Refusable      Need = "a resource that Entra does not know"
	UnboundPod     Need = "a caller without identity"
	SeveralIDs     Need = "a caller with several identities"
	PendingPod     Need = "a caller whose identity is on its way"
	SecondPod      Need = "a second caller"
	SeenUpstream   Need = "a look at the service behind"
	UpstreamFaults Need = "faults of the service behind"
	RealClients    Need = "the SDKs themselves"
)

// unmet lists what the target cannot give of what a case needs.
func (t *Target) unmet(needs []Need) []string {
	have := map[Need]bool{
		ClientID: t.ClientID != "", ResourceID: t.ResourceID != "", Refusable: t.UnknownResource != "",
		UnboundPod: t.Stage.Unbound != nil, SeveralIDs: t.Stage.Several != nil, PendingPod: t.Stage.Pending != nil,
		SecondPod: t.Stage.Neighbour != nil, SeenUpstream: t.Stage.Upstream != nil, UpstreamFaults: t.Stage.Fault != nil,
		RealClients: t.Stage.Clients != nil,
	}
	var unmet []string
	for _, need := range needs {
		if !have[need] {
			unmet = append(unmet, string(need))
		}
	}
	return unmet
}

// Result is what became of a case.
type Result struct {
	Case
	NotRun   string   // why; "" if it was run
	Failures []string // what was seen, and what was expected; none if it passed
}

// Passed reports whether the case was run and nothing is wrong.
func (r Result) Passed() bool { return r.NotRun == "" && len(r.Failures) == 0 }

// Failed reports whether the case was run and something is wrong.
func (r Result) Failed() bool { return r.NotRun == "" && len(r.Failures) > 0 }

// Run takes the cases in turn.
func Run(ctx context.Context, target Target, cases []Case) []Result {
	if target.Subject == nil {
		target.Subject = appID
	}
	var results []Result
	var errors []answer // of all cases
	for _, c := range cases {
		result := Result{Case: c}
		if unmet := target.unmet(c.Needs); len(unmet) > 0 {
			result.NotRun = "needs " + strings.Join(unmet, "; ")
		} else {
			talk := &conversation{Target: target, ctx: ctx, errors: errors}
			c.check(talk)
			result.Failures, errors = talk.failures, talk.errors
		}
		results = append(results, result)
	}
	return results
}

// WithoutPolicy leaves out the cases in which the real service gives more than
// the agent: it fails them, and must.
func WithoutPolicy(cases []Case) []Case {
	return slices.DeleteFunc(slices.Clone(cases), func(c Case) bool { return c.Mark == Policy })
}
