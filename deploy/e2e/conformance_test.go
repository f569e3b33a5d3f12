//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/conformance"
	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

var write = flag.Bool("write", false, "print what was measured, and write it to the documents that quote it")

const conformanceDoc = "../../docs/conformance.md"

// The whole table, from pods' namespaces through each redirect.
func TestConformance(t *testing.T) {
	var columns []conformance.Column
	for _, redirect := range redirects {
		t.Run(redirect, func(t *testing.T) {
			results := conformance.Run(t.Context(), beginWith(t, redirect).target(), conformance.Cases())
			columns = append(columns, conformance.Column{Title: redirect, Results: results})
			for _, r := range results {
				t.Run(fmt.Sprintf("%d %s", r.Number, r.Name), func(t *testing.T) {
					assert.Empty(t, r.NotRun)
					for _, failure := range r.Failures {
						t.Error(failure)
					}
				})
			}
		})
	}
	if *write {
		require.Len(t, columns, len(redirects))
		writeConformance(t, columns)
	}
	doc, err := os.ReadFile(conformanceDoc)
	require.NoError(t, err)
	rows := strings.Count(string(doc), "\n| ") - 1
	for _, c := range conformance.Cases() {
		if assert.Contains(t, string(doc), "\n"+conformance.MarkdownRow(c), "make conformance writes it") {
			rows--
		}
	}
	assert.Zero(t, rows, "there are rows of other cases")
}

func writeConformance(t *testing.T, columns []conformance.Column) {
	t.Helper()
	var doc bytes.Buffer
	doc.WriteString(conformanceIntro)
	for _, c := range columns {
		fmt.Printf("%s:\n", c.Title)
		require.NoError(t, conformance.WriteText(os.Stdout, c.Results))
		fmt.Fprintf(&doc, "* %s: %s.\n", c.Title, conformance.Summary(c.Results))
	}
	doc.WriteString("\n")
	require.NoError(t, conformance.WriteMarkdown(&doc, columns...))
	require.NoError(t, os.WriteFile(conformanceDoc, doc.Bytes(), 0o644))
}

const conformanceIntro = `# Conformance

What a metadata service must do for the clients that exist, and whether the agent does. Written by
` + "`sudo make conformance`" + `, which runs each case from a pod's network namespace through the real agent in
managed mode with ` + "`--strict-identity-selection`" + ` (case 25: in standard mode) and a real API server; in Azure's place is
` + "`proxy/imdstest`" + `. All of it is done twice, with each real redirect: the rules of iptables that ` + "`--redirect-mode=auto`" + ` chooses,
and the programs of [` + "`--redirect-mode=ebpf`" + `](ebpf.md), with pods' processes in cgroups as the kubelet makes them.
The same runs in ` + "`make e2e`" + `, which fails if a case does.

R is a valid request: ` + "`GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=…`" + ` with the header
` + "`Metadata: true`" + `. How a case is known: **W** captured from the real service, **D** Microsoft's documentation
(pages of learn.microsoft.com, by the end of their address), **S** read in the source of an SDK, **O** seen when SDKs were run, **P** the agent's own policy, where
the real service gives more.

Any other service can be tried, such as that of a virtual machine of Azure's; what cannot be arranged there is listed as
not run: ` + "`go run ./deploy/conformance/cmd --url http://169.254.169.254 --client-id <id> --skip-policy`" + `.

`

// target is the agent as a pod meets it, and all that can be arranged around it.
func (s *scenario) target() conformance.Target {
	s.t.Helper()
	for i, id := range []imdstest.Identity{cart, report} {
		name := fmt.Sprintf("pair-%d", i)
		s.identity("shop", name, id)
		s.binding("shop", name, name, "pair")
	}
	bound := s.pod("cart-0", "10.244.0.71", testbed.Ptp, "cart")
	neighbour := s.pod("report-0", "10.244.0.72", testbed.Ptp, "report")
	unbound := s.pod("nobody-0", "10.244.0.73", testbed.Ptp, "nothing")
	several := s.pod("pair-0", "10.244.0.74", testbed.Ptp, "pair")
	agent := s.agent("--strict-identity-selection")
	// What the API server lists may be a moment old. From here on it is known.
	bound.hears(vault, cart.ClientID)
	neighbour.hears(vault, report.ClientID)
	several.hears(vault+"&client_id="+cart.ClientID, cart.ClientID)
	several.hears(vault+"&client_id="+report.ClientID, report.ClientID)
	return conformance.Target{
		Caller: bound.caller(cart), Host: strings.TrimSuffix(testbed.MetadataAddress, ":80"), Resource: vault,
		UnknownResource: "https://nobody.example", Subject: imdstest.Subject,
		Stage: conformance.Stage{
			Neighbour: func(context.Context) (conformance.Caller, error) { return neighbour.caller(report), nil },
			Unbound:   func(context.Context) (conformance.Caller, error) { return unbound.caller(imdstest.Identity{}), nil },
			Several:   func(context.Context) (conformance.Caller, error) { return several.caller(report), nil },
			Pending:   func(context.Context) (conformance.Pending, error) { return s.pending(agent), nil },
			Upstream:  upstreamTargets,
			Clients:   func(context.Context) error { return s.clientsWork() },
			Fault: func(f conformance.Fault) {
				world.IMDS.Inject(imdstest.Fault{Status: f.Status, Body: f.Body, RetryAfter: f.RetryAfter})
			},
		},
	}
}

// caller is the pod as the suite knows it: somebody who may use the identity.
func (p *pod) caller(id imdstest.Identity) conformance.Caller {
	return conformance.Caller{
		Dial:     func(ctx context.Context) (net.Conn, error) { return p.DialContext(ctx, "tcp", testbed.MetadataAddress) },
		ClientID: id.ClientID, ObjectID: id.ObjectID, ResourceID: id.ResourceID,
	}
}

// pending is a pod that MIC has not assigned its identity to. For its sake an agent
// in standard mode takes over, until it is done.
func (s *scenario) pending(managed *testbed.Agent) conformance.Pending {
	s.t.Helper()
	s.identity("shop", "standard", cart)
	s.binding("shop", "standard", "standard", "standard")
	p := s.pod("pending-0", "10.244.0.75", testbed.Ptp, "standard")
	standard := s.successor("--operation-mode=standard", "--identity-wait=1s")
	s.stops(managed)
	p.hearsNotYet()
	return conformance.Pending{
		Caller: p.caller(cart),
		Assign: func(context.Context) error {
			s.assignment("pending", "pending-0", "Assigned", cart)
			return nil
		},
		Done: func() error {
			s.successor("--strict-identity-selection")
			s.stops(standard)
			return nil
		},
	}
}

// upstreamTargets lists what has reached the metadata service.
func upstreamTargets() (targets []string) {
	for _, call := range world.IMDS.Calls() {
		targets = append(targets, call.Target)
	}
	return targets
}
