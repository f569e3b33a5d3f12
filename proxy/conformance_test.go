package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/deploy/conformance"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// What SDKs need of a metadata service, case by case, without a kernel's redirect and an API
// server; docs/conformance.md has the table.
func TestConformance(t *testing.T) {
	w := newWorld(t, nil)
	strict := newWorld(t, func(c *Config) {
		c.Pods = runResolver(t, podresolver.Config{StrictSelection: true, Logger: slog.New(slog.DiscardHandler)})
	})
	caller := func(w *world, from string, id imdstest.Identity) conformance.Caller {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
		return conformance.Caller{
			Dial:     func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", w.addr) },
			ClientID: id.ClientID, ResourceID: id.ResourceID,
		}
	}
	as := func(c conformance.Caller) func(context.Context) (conformance.Caller, error) {
		return func(context.Context) (conformance.Caller, error) { return c, nil }
	}
	target := conformance.Target{
		Caller: caller(w, bound, one), Host: "169.254.169.254", Resource: "https://vault.azure.net",
		UnknownResource: "https://nobody.example", Subject: imdstest.Subject,
		Stage: conformance.Stage{
			Unbound:   as(caller(w, unbound, imdstest.Identity{})),
			Several:   as(caller(strict, bound, one)),
			Neighbour: as(caller(w, alsoBound, one)),
			Upstream: func() (targets []string) {
				for _, call := range w.imds.Calls() {
					targets = append(targets, call.Target)
				}
				return targets
			},
			Fault: func(f conformance.Fault) {
				w.imds.Inject(imdstest.Fault{Status: f.Status, Body: f.Body, RetryAfter: f.RetryAfter})
			},
		},
	}
	var notRun []int
	for _, r := range conformance.Run(t.Context(), target, conformance.Cases()) {
		if r.NotRun != "" {
			notRun = append(notRun, r.Number)
		}
		assert.Empty(t, r.Failures, "%d %s", r.Number, r.Name)
	}
	assert.Equal(t, []int{25, 48}, notRun, "standard mode, and the SDKs themselves: see deploy/e2e")
}
