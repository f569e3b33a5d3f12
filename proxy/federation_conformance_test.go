package proxy

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/deploy/conformance"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
)

// TestFederatedConformance: a token by federation comes in IMDS's shape, case by case.
func TestFederatedConformance(t *testing.T) {
	const unknown = "https://nobody.example"
	f := newFederationWorldIn(t, "", func(*federationWorld, *upstream.Config) {}, unknown)
	caller := func(from string) conformance.Caller {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
		return conformance.Caller{Dial: func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", f.addr) }}
	}
	target := conformance.Target{
		Caller: caller(byBinding), Host: "169.254.169.254", Resource: "https://vault.azure.net", UnknownResource: unknown, Subject: imdstest.Subject,
		Stage: conformance.Stage{
			Neighbour: func(context.Context) (conformance.Caller, error) {
				c := caller(ofCart)
				c.ClientID = cartID
				return c, nil
			},
			Upstream: func() (targets []string) {
				for _, call := range f.entra.Calls() {
					targets = append(targets, call.Path)
				}
				return targets
			},
			Fault: func(fault conformance.Fault) {
				f.entra.Inject(entratest.Fault{Status: fault.Status, Body: fault.Body, RetryAfter: fault.RetryAfter})
			},
		},
	}
	target.ClientID, target.ResourceID = boundID, boundPath
	var notRun []int
	for _, r := range conformance.Run(t.Context(), target, conformance.Cases()) {
		if r.NotRun != "" {
			notRun = append(notRun, r.Number)
			continue
		}
		assert.Empty(t, r.Failures, "%d %s", r.Number, r.Name)
	}
	assert.Equal(t, []int{23, 24, 25, 37, 48}, notRun, "those of pods without an identity or with several, which TestConformance has, and of other programs")
}
