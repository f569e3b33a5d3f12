package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

func TestRefusalsAreRemembered(t *testing.T) {
	w := newWorld(t, nil)
	for range 7 { // more than the log takes
		resp, _ := w.get(unbound, tokenURL)
		assert.Equal(t, 400, resp.StatusCode)
	}
	w.get(bound, tokenURL+"&client_id=dead0000-0000-4000-8000-000000000001")
	w.imds.Inject(imdstest.Fault{Status: 400, Body: `{"error":"invalid_request","error_description":"Identity not found"}`})
	w.get(bound, tokenURL)
	w.get(bound, "/metadata/nothing")       // the client's mistakes
	w.send(bound, request("GET", tokenURL)) // are not among them
	w.get(stranger, tokenURL)

	refusals := w.server.Refusals(netip.MustParseAddr(unbound))
	if assert.Len(t, refusals, 1) {
		r := refusals[0]
		assert.Equal(t, "shop/unbound", r.Pod)
		assert.Equal(t, 400, r.Status)
		assert.Equal(t, podresolver.NoIdentityBound, r.Reason)
		assert.Contains(t, r.Text, `no AzureIdentityBinding in namespace "shop" has the selector "nothing"`)
		assert.Contains(t, r.Fix, "create an AzureIdentityBinding", "of those that the log has no room for, too")
		assert.Equal(t, uint64(7), r.Count)
		assert.False(t, r.Last.Before(r.First))
	}
	var reasons []string
	for _, r := range w.server.Refusals(netip.MustParseAddr(bound)) {
		reasons = append(reasons, r.Reason)
	}
	assert.Equal(t, []string{IdentityUnknownToIMDS, podresolver.RequestedIdentityMissing}, reasons, "the last first")
	assert.Contains(t, w.server.Refusals(netip.MustParseAddr(bound))[0].Text, "IMDS does not know this identity on this node")
	assert.Contains(t, w.log.String(), "reason=IdentityUnknownToIMDS")
	assert.Equal(t, strings.Count(w.log.String(), `msg="not served"`), strings.Count(w.log.String(), ` fix="`), "each line names what to do:\n%s", w.log)
	counts := w.server.Stats().Refused
	assert.Len(t, counts, len(Reasons()), "the others are 0")
	for reason, n := range counts {
		assert.Equal(t, map[string]uint64{
			podresolver.NoIdentityBound: 7, podresolver.RequestedIdentityMissing: 1, IdentityUnknownToIMDS: 1, podresolver.PodUnknown: 1,
		}[reason], n, reason)
	}
	if unknown := w.server.Refusals(netip.MustParseAddr(stranger)); assert.Len(t, unknown, 1) {
		assert.Equal(t, podresolver.PodUnknown, unknown[0].Reason)
		assert.Empty(t, unknown[0].Pod)
	}
	assert.Len(t, w.server.RefusedCallers(), 3)
}

// A pod can be refused for any number of causes, with texts of any length, and one that the log
// has no room for is no less precise.
func TestRefusalsAreBounded(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	m := newRefusals()
	long := strings.Repeat("ä", 1<<20)
	for caller := range 3 * maxRefusedCallers {
		addr := netip.AddrFrom4([4]byte{10, 244, byte(caller >> 8), byte(caller)})
		for i := range 3 * maxRefusals {
			m.add(addr, Refusal{Pod: "shop/p", Reason: "R", cause: fmt.Sprint(i, long[:2000]), Text: fmt.Sprint(i, long[:2000]), Fix: long[:2000]}, true)
		}
	}
	assert.Less(t, heap()-before, uint64(2<<20))
	assert.Len(t, m.callers(), maxRefusedCallers)
	last := netip.AddrFrom4([4]byte{10, 244, (3*maxRefusedCallers - 1) >> 8, (3*maxRefusedCallers - 1) & 255})
	all := m.of(last)
	assert.Len(t, all, maxRefusals)
	assert.Equal(t, fmt.Sprint(3*maxRefusals-1), all[0].Text[:2])
	assert.LessOrEqual(t, len(all[0].Text), maxRefusalText)
	assert.True(t, strings.HasSuffix(all[0].Text, "ä…"), "whole letters")

	m.add(last, Refusal{Pod: "shop/p", cause: "c", Reason: "Precise", Text: "c, and why", Fix: "change c"}, true)
	m.add(last, Refusal{Pod: "shop/p", cause: "c", Reason: "General", Text: "c"}, false)
	assert.Equal(t, "Precise", m.of(last)[0].Reason)
	assert.Equal(t, "c, and why", m.of(last)[0].Text)
	assert.Equal(t, "change c", m.of(last)[0].Fix)
	assert.Equal(t, uint64(2), m.of(last)[0].Count)
	m.add(last, Refusal{Pod: "shop/q", cause: "c", Reason: "General", Text: "c"}, false)
	assert.Equal(t, uint64(1), m.of(last)[0].Count, "another pod that has the address now")
	assert.Empty(t, m.of(netip.MustParseAddr("10.0.0.1")))
}

func TestReasons(t *testing.T) {
	failure := func(class tokencache.Class, err error) error {
		return fmt.Errorf("pod: %w", &tokencache.Failure{Class: class, RetryAfter: time.Second, Err: err})
	}
	imds := func(status int, code, description string) error {
		return &upstream.Error{Source: "IMDS", Status: status, Code: code, Description: description}
	}
	entra := func(status int) error {
		return &upstream.Error{Source: "Entra", Status: status, Code: "invalid_client"}
	}
	for want, err := range map[string]error{
		podresolver.AddressAmbiguous: podresolver.ErrAmbiguousAddress,
		podresolver.NotSynced:        fmt.Errorf("%w: pods", podresolver.ErrNotSynced),
		podresolver.PodUnconfirmed:   podresolver.ErrUnconfirmed,
		TokensWithheldOnBridge:       fmt.Errorf("%w: br0", ErrSource),
		IdentityUnknownToIMDS:        failure(tokencache.Refused, imds(400, "invalid_request", "Identity not found")),
		IMDSRefused:                  failure(tokencache.Refused, imds(400, "invalid_resource", "AADSTS500011")),
		IMDSUnavailable:              failure(tokencache.Unavailable, imds(500, "", "")),
		EntraRefused:                 failure(tokencache.Refused, entra(401)),
		EntraUnavailable:             failure(tokencache.Unavailable, fmt.Errorf("%w: EOF", upstream.ErrEntra)),
		Throttled:                    failure(tokencache.Throttled, imds(429, "", "")),
		TooManyWaiting:               failure(tokencache.Unavailable, tokencache.ErrBusy),
		CredentialUnusable:           failure(tokencache.Refused, &upstream.CredentialError{}),
		RequestInvalid:               errNotFound,
	} {
		assert.Equal(t, want, Reason(err))
	}
	assert.Equal(t, IMDSUnavailable, Reason(errors.New("connection refused")), "of what is passed through")
}

func TestPresence(t *testing.T) {
	set := func(c *Config) { c.Version = "v1.2.3" }
	w := newWorld(t, set)
	for from, known := range map[string]bool{bound: true, unbound: true, excepted: true, stranger: false} {
		start := time.Now()
		resp, body := w.get(from, "/metadata/nmi")
		assert.Equal(t, 200, resp.StatusCode)
		assert.JSONEq(t, fmt.Sprintf(`{"agent":"nmi","version":"v1.2.3","pod_known":%t}`, known), body)
		assert.Less(t, time.Since(start), patience)
	}
	assert.Zero(t, w.imds.Requests(), "not even of an excepted pod")
	for _, tc := range []struct {
		raw    string
		status int
	}{
		{request("GET", "/metadata/nmi"), 400}, // somebody may have been tricked into sending it
		{request("GET", "/metadata/nmi", "Metadata: true", "X-Forwarded-For: 1.2.3.4"), 400},
		{request("POST", "/metadata/nmi", "Metadata: true"), 405},
		{request("GET", "/metadata/nmi/", "Metadata: true"), 404},
		{request("GET", "/metadata/NMI", "Metadata: true"), 404},
		{request("GET", "/METADATA/nmi", "Metadata: true"), 404},
		{request("GET", "//metadata/nmi", "Metadata: true"), 200},
	} {
		resp, body := w.send(bound, tc.raw)
		assert.Equal(t, tc.status, resp.StatusCode, "%s\n%s", tc.raw, body)
	}
	assert.Empty(t, w.server.RefusedCallers())

	w = newWorld(t, func(c *Config) { set(c); c.PodsOnly = true })
	resp, body := w.get(bound, "/metadata/nmi")
	assert.Equal(t, 200, resp.StatusCode, body)
	resp, body = w.get(stranger, "/metadata/nmi")
	assert.Equal(t, 404, resp.StatusCode, "where connections that were not redirected come in, too")
	assert.NotContains(t, body, "v1.2.3")
}
