package conformance

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestTheTableIsComplete(t *testing.T) {
	cases := Cases()
	assert.Len(t, cases, 51)
	for i, c := range cases {
		assert.Equal(t, i+1, c.Number)
		assert.NotEmpty(t, c.Name, c.Number)
		assert.Contains(t, []Mark{Wire, Documented, SDK, Observed, Policy}, c.Mark, c.Number)
		assert.NotEmpty(t, c.Source, c.Number)
		assert.NotEmpty(t, c.Sends, c.Number)
		assert.NotNil(t, c.check, c.Number)
	}
}

var known = imdstest.Identity{ClientID: "c1d2e3f4-0000-4000-8000-00000000000a", ObjectID: "0b1ec700-0000-4000-8000-00000000000a", ResourceID: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/one"}

// atURL is a target with nothing around it.
func atURL(srv *httptest.Server) Target {
	address := srv.Listener.Addr().String()
	return Target{
		Caller: Caller{
			Dial:     func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "tcp", address) },
			ClientID: known.ClientID, ObjectID: known.ObjectID, ResourceID: known.ResourceID,
		},
		NameIdentity: true, Host: address, Resource: "https://vault.azure.net", Subject: imdstest.Subject,
	}
}

func TestTheFakeServiceDoesWhatTheRealOneDoes(t *testing.T) {
	srv := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}}).Start()
	defer srv.Close()
	ran := 0
	for _, r := range Run(t.Context(), atURL(srv), WithoutPolicy(Cases())) {
		if r.NotRun == "" && r.Number != 21 { // there the fake is the more forgiving one
			ran++
			assert.Empty(t, r.Failures, "%d %s", r.Number, r.Name)
		}
	}
	assert.Greater(t, ran, 25)
}

func TestWhatCannotBeArrangedIsNotRunAndSaysWhy(t *testing.T) {
	srv := imdstest.NewServer(imdstest.Config{}).Start()
	defer srv.Close()
	target := atURL(srv)
	target.ClientID, target.ResourceID, target.NameIdentity = "", "", false
	notRun := map[int]string{}
	for _, r := range Run(t.Context(), target, Cases()) {
		if r.NotRun != "" {
			notRun[r.Number] = r.NotRun
			assert.False(t, r.Passed())
			assert.False(t, r.Failed())
		}
	}
	assert.Equal(t, map[int]string{
		14: "needs the client ID of the caller's identity",
		17: "needs the resource ID of the caller's identity",
		18: "needs the resource ID of the caller's identity",
		19: "needs the resource ID of the caller's identity",
		23: "needs a caller with several identities",
		24: "needs a caller without identity",
		25: "needs a caller whose identity is on its way",
		26: "needs a look at the service behind",
		27: "needs a look at the service behind",
		30: "needs a resource that Entra does not know",
		31: "needs faults of the service behind",
		34: "needs faults of the service behind",
		37: "needs a caller without identity; a look at the service behind",
		46: "needs a look at the service behind",
		47: "needs a second caller",
		48: "needs the SDKs themselves",
	}, notRun)
}

// A service that is wrong must fail every case that is run.
func TestWrongServicesFail(t *testing.T) {
	token := `{"access_token":"x.y","client_id":"someone else","expires_in":86399,"expires_on":null,"resource":"other","token_type":""}`
	for name, service := range map[string]http.HandlerFunc{
		"somebody else's token, whatever is asked": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, token) },
		"text that says unreachable":               func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "Network unreachable", 400) },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/metadata/identity/oauth2/token", http.StatusMovedPermanently)
		},
		"silence": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(service)
			defer srv.Close()
			for _, r := range Run(t.Context(), atURL(srv), Cases()) {
				if r.NotRun == "" {
					assert.True(t, r.Failed(), "%d %s", r.Number, r.Name)
				}
			}
		})
	}
}

// The service alone, as a pod meets it on a node without an agent.
func TestAServiceThatKnowsNoPodsFailsWhatOneMustKnowThemFor(t *testing.T) {
	fake := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	srv := fake.Start()
	defer srv.Close()
	target := atURL(srv)
	target.UnknownResource = "https://nobody.example"
	nameless := Caller{Dial: target.Dial}
	target.Stage = Stage{
		Unbound: func(context.Context) (Caller, error) { return nameless, nil },
		Several: func(context.Context) (Caller, error) { return target.Caller, nil },
		Pending: func(context.Context) (Pending, error) {
			return Pending{Caller: nameless, Assign: func(context.Context) error { return nil }, Done: func() error { return nil }}, nil
		},
		Upstream: func() (targets []string) {
			for _, call := range fake.Calls() {
				targets = append(targets, call.Target)
			}
			return targets
		},
		Fault: func(f Fault) {
			fake.Inject(imdstest.Fault{Status: f.Status, Body: f.Body, RetryAfter: f.RetryAfter})
		},
		Clients: func(context.Context) error { return errors.New("adal: no token") },
	}
	// Without retries of the agent's own, the clients' take their time.
	quick := slices.DeleteFunc(Cases(), func(c Case) bool { return c.Number == 34 })
	var fails []int
	for _, r := range Run(t.Context(), target, quick) {
		if r.Failed() {
			fails = append(fails, r.Number)
		}
	}
	assert.Subset(t, fails, []int{23, 24, 25, 37, 41, 46, 48})
	for _, number := range []int{30, 31} {
		assert.NotContains(t, fails, number)
	}
}

func TestReports(t *testing.T) {
	results := []Result{
		{Case: Case{Number: 1, Name: "one", Mark: Wire, Source: "a page", Sends: "R"}},
		{Case: Case{Number: 2, Name: `two\three|four`, Mark: Policy, Source: "us", Sends: "R_*"}, Failures: []string{"R: 200, expected 400", "and more"}},
		{Case: Case{Number: 3, Name: "three", Mark: SDK, Source: "adal", Sends: "R"}, NotRun: "needs luck"},
	}
	var text, markdown strings.Builder
	assert.NoError(t, WriteText(&text, results))
	assert.Equal(t, ` 1  passes   W  one
 2  FAILS    P  two\three|four
                R: 200, expected 400
                and more
 3  not run  S  three
                needs luck
3 cases: 1 pass, 1 fail, 1 not run
`, text.String())
	passed := slices.Clone(results)
	for i := range passed {
		passed[i].Failures, passed[i].NotRun = nil, ""
	}
	assert.NoError(t, WriteMarkdown(&markdown, Column{"here", results}, Column{"there", passed}))
	assert.Equal(t, `| # | case | known from | sends | here | there |
|---:|---|---|---|---|---|
| 1 | one | W: a page | R | passes | passes |
| 2 | two\\three\|four | P: us | R\_\* | **FAILS**: R: 200, expected 400; and more | passes |
| 3 | three | S: adal | R | not run: needs luck | passes |
`, markdown.String())
}

func TestWhoseTokenAJWTIs(t *testing.T) {
	assert.Equal(t, "one", appID("e30.eyJhcHBpZCI6Im9uZSJ9.c2ln"))
	for _, token := range []string{"", "x", "a.b.c", "e30.e30.e30"} {
		assert.Empty(t, appID(token), token)
	}
}
