package status

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

func get(handler http.Handler, target string, change ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, target, nil) //nolint:noctx // it is served at once
	r.RemoteAddr, r.Host = "127.0.0.1:40000", "127.0.0.1:8085"
	for _, c := range change {
		c(r)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

func TestPage(t *testing.T) {
	handler := Handler(sample, http.NotFoundHandler())
	w := get(handler, Page)
	require.Equal(t, 200, w.Code)
	assert.Equal(t, "text/html; charset=utf-8", w.Header().Get("Content-Type"))
	assert.Contains(t, w.Header().Get("Content-Security-Policy"), "default-src 'none'")
	page := w.Body.String()
	for _, text := range []string{
		`<meta http-equiv="refresh" content="30">`, "<title>ready · aks-user-31415926-vmss000003 · nmi</title>", "nmi v0.1.0 · standard mode · up 3 d 4 h",
		"guard and routing in place", "throttles this node for another 42\u00a0s", "2 refused, 1 refused recently, 2 served, 3 without an identity",
		"10.244.0.12", "SelectorCaseDiffers", "<b>Fix:</b>set the pod&#39;s label aadpodidbinding", "400 invalid_request: Identity not found",
		"https://vault.azure.net", "expires in", "4 h 31 min", "refresh in 12 min", "2 refreshes failed", "212 times", "3 s</time> ago", "no pod on this node has this address",
	} {
		assert.Contains(t, page, text)
	}
	assert.NotRegexp(t, `(?i)<script|<link|<img|src=|url\(|@import`, page, "nothing from elsewhere")
	assert.NotContains(t, get(handler, Page+"?refresh=off").Body.String(), "http-equiv")
	assert.Equal(t, 404, get(handler, "/else").Code)
}

func TestPageAsJSON(t *testing.T) {
	w := get(Handler(sample, http.NotFoundHandler()), Page+"?format=json")
	assert.Equal(t, "application/json", w.Header().Get("Content-Type"))
	var got Snapshot
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &got))
	assert.Equal(t, sample(), got)
}

// hostile replaces every string of a snapshot, whatever its field. Names in a cluster are
// checked, but not all that is shown is a name: labels, selectors, resources, errors.
func hostile(v reflect.Value, text string) {
	switch v.Kind() {
	case reflect.String:
		if v.Type() == reflect.TypeFor[string]() {
			v.SetString(text)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			hostile(v.Elem(), text)
		}
	case reflect.Slice:
		for i := range v.Len() {
			hostile(v.Index(i), text)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				hostile(v.Field(i), text)
			}
		}
	}
}

func TestNothingIsInjected(t *testing.T) {
	page := func(text, query string) string {
		s := sample()
		hostile(reflect.ValueOf(&s).Elem(), text)
		return get(Handler(func() Snapshot { return s }, http.NotFoundHandler()), Page+query).Body.String()
	}
	tags := regexp.MustCompile(`<[^>]*>`)
	want := tags.FindAllString(page("word", ""), -1)
	for _, text := range []string{
		`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' autofocus onfocus='alert(1)`, `</title></style></main><h1>`, `{{.}}`, "javascript:alert(1)", "&lt;b&gt;", "<!--", "\x00<b>",
	} {
		got := page(text, "")
		assert.Equal(t, want, tags.FindAllString(got, -1), "the same tags as with any word, by %s", text)
		if strings.ContainsAny(text, `<>&"'`) {
			assert.NotContains(t, got, text, "as it is")
		}
	}
	assert.NotContains(t, page("<script>", "?format=json"), "<script>", "should a browser take JSON for HTML")
}

// The page of a node that is at its worst is bounded, as docs/security.md has it.
func TestTheLargestPage(t *testing.T) {
	s := sample()
	long := strings.Repeat("x", 253)
	worst := s.Pods[2]
	worst.Namespace, worst.Name, worst.Refusals, worst.Tokens = long[:63], long, nil, nil
	for range 4 {
		r := s.Pods[2].Refusals[0]
		r.Text = strings.Repeat(`"`, 400) // each of which takes several bytes
		worst.Refusals = append(worst.Refusals, r)
	}
	for range maxTokens {
		token := s.Pods[2].Tokens[0]
		token.Resource = strings.Repeat(`"`, maxResource)
		worst.Tokens = append(worst.Tokens, token)
	}
	s.Pods = nil
	for range 250 {
		s.Pods = append(s.Pods, worst)
	}
	handler := Handler(func() Snapshot { return s }, http.NotFoundHandler())
	for _, target := range []string{Page, Page + "?format=json"} {
		size := get(handler, target).Body.Len()
		t.Logf("%s: %d KiB", target, size>>10)
		assert.Less(t, size, 4<<20)
	}
}

func TestLoopbackHandler(t *testing.T) {
	handler := LoopbackHandler(sample, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "health") }))
	from := func(addr string) func(*http.Request) { return func(r *http.Request) { r.RemoteAddr = addr } }
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	for _, name := range []string{"127.0.0.1:8085", "127.0.0.1", "[::1]:8085", "localhost:12345", "localhost", "10.0.0.4:8085"} {
		assert.Equal(t, 200, get(handler, Page, host(name)).Code, name)
	}
	assert.Equal(t, 200, get(handler, Page, from("[::1]:40000")).Code)
	for _, addr := range []string{"10.244.0.7:40000", "169.254.169.254:80", "", "@"} {
		w := get(handler, Page, from(addr))
		assert.Equal(t, 403, w.Code, addr)
		assert.NotContains(t, w.Body.String(), "shop")
		assert.Equal(t, "health", get(handler, "/readyz", from(addr)).Body.String())
	}
	for _, name := range []string{"evil.example:8085", "evil.example", "127.0.0.1.evil.example", ""} { // DNS rebinding
		assert.Equal(t, 403, get(handler, Page, host(name)).Code, name)
	}
	for _, target := range []string{"//statusz", "/./statusz", "/x/../statusz", "/statusz/", "/%73tatusz"} { // in another spelling
		w := get(handler, target, from("10.244.0.7:40000"))
		assert.NotContains(t, w.Body.String(), "shop", target)
	}
}

func TestPrintedSnapshot(t *testing.T) {
	s := sample()
	var out strings.Builder
	Printer{terminal.Printer{Out: &out}}.Snapshot(&s)
	assert.Equal(t, `nmi v0.1.0 on node aks-user-31415926-vmss000003 is ready, standard mode, up 3 d 4 h

√ redirect     dnat, by iptables-nft: interface azv7c1a2, which leads to pod address 10.244.0.11, has no IPv4 address
√ fences       guard and routing in place
‼ other rules  antispoof not in place; the agent serves without
√ API server   in sync; last heard of each of 2 resources within 41 s
‼ IMDS         throttles this node for another 42 s; 1 of 4 requests in flight, 0 waiting; 18 a second at most
√ Entra        0 fetches in flight, 0 waiting; 18 a second at most for each authority
‼ tokens       4 in memory; 1 cannot be had
√ connections  7 open, 1 busy
- no other agent can take over from this one: the directory /run/nmi is not the node's

pods: 2 refused, 1 refused recently, 2 served, 3 without an identity
  NAMESPACE    POD                           ADDRESS      GETS                                                   TOKENS  NEXT EXPIRY
× shop         report-6d4b9c7f5d-x2x9p       10.244.0.12  SelectorCaseDiffers                                    0
× bank         ledger-0                      10.244.0.17  AzureIdentity bank/ledger                              0
‼ shop         search-0                      10.244.0.13  AzureIdentity shop/cart                                1       22 h
√ shop         cart-7f8d4b6c9-4k2mz          10.244.0.11  AzureIdentity shop/cart                                3       4 h 31 min
√ kube-system  azure-policy-7c9d8f6b5-tq8wn  10.244.0.4   the node's identities (exception aks-addon-exception)  0

× shop/report-6d4b9c7f5d-x2x9p: SelectorCaseDiffers
    no AzureIdentityBinding in namespace "shop" has the selector "Report"
    AzureIdentityBinding shop/report does not match: its selector "report" differs in case
    212 times in 59 min 57 s, the last 3 s ago: 400 SelectorCaseDiffers
fix: set the pod's label aadpodidbinding (in its controller's template) to "report", the selector of AzureIdentityBinding shop/report
`, out.String()[:strings.Index(out.String(), "\n× bank/")])
	s.Agent.Ready, s.Agent.Problems = false, []string{"the iptables rules are not in place yet"}
	out.Reset()
	Printer{terminal.Printer{Out: &out, Color: true}}.Snapshot(&s)
	assert.Contains(t, out.String(), "\x1b[31mnot ready\x1b[0m")
	assert.True(t, strings.HasSuffix(out.String(), "\n\x1b[31m×\x1b[0m the iptables rules are not in place yet\n"), "errors last")
}

// A pod's words cannot move the cursor, or change the title of the terminal.
func TestPrintedTextIsHarmless(t *testing.T) {
	s := sample()
	hostile(reflect.ValueOf(&s).Elem(), "a\x1b]0;x\x07\x1b[2J\u202eb\nc\xff")
	var out strings.Builder
	Printer{terminal.Printer{Out: &out}}.Snapshot(&s)
	for i := range s.Pods {
		Printer{terminal.Printer{Out: &out}}.Pod(&s.Pods[i], s.Time)
	}
	for _, r := range out.String() {
		require.False(t, r != '\n' && (r < ' ' || r == 0x7f || r == '\u202e'), "%q", r)
	}
}
