package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// senders are the pods that the fuzzers send from. None of them is excepted, so that
// nothing but what is on the list may be passed through.
var senders = [...]string{bound, unbound, stranger, secret}

// FuzzFront sends one request of arbitrary method, target and header through the real
// front, for whatever server is underneath.
func FuzzFront(f *testing.F) {
	front := newFuzzedFront(f)
	const query = "?api-version=2018-02-01&resource=https://vault.azure.net/"
	for _, s := range []struct{ method, target, header string }{
		{"GET", tokenURL, "Metadata: true"},
		{"GET", tokenURL + "&msi_res_id=" + two.ResourceID, "metadata: true\nx-client-SKU: MSAL"},
		{"GET", tokenURL + "&bypass_cache=true", "Metadata:\ttrue "},
		{"GET", tokenURL + "&token_sha256_to_refresh=00&%63lient_id=" + one.ClientID, "Metadata: true"},
		{"POST", tokenURL, "Metadata: true\nContent-Length: 3"},
		{"GET", tokenURL, "Metadata: true\nX-Forwarded-For: 1.2.3.4\nConnection: X-Forwarded-For, close"},
		{"GET", "/METADATA/identity/oauth2/token" + query, "Metadata: true"},
		{"GET", "//metadata/identity/oauth2/token" + query, "Metadata: true"},
		{"GET", "/metadata/identity/oauth2/token/" + query, "Metadata: true"},
		{"GET", `/metadata/instance\..\identity\oauth2\token` + query, "Metadata: true"},
		{"GET", "/metadata/instance/%2e%2e/identity/oauth2/token" + query, "Metadata: true"},
		{"GET", "/metadata/instance/..;/identity%252finfo" + query, "Metadata: true"},
		{"POST", "/metadata/identity/issuecredential?cred-api-version=2.0", "Metadata: true\nContent-Length: 0"},
		{"GET", "/metadata/identity/info" + query, "Metadata: true"},
		{"GET", "/metadata/attested/document" + query, "Metadata: true\nConnection: Metadata"},
		{"GET", "/metadata/versions", "Metadata: true\nTransfer-Encoding: chunked\nContent-Length: 4"},
		{"GET", "/metadata/versions", "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"},
		{"GET", "http://u:p@h:80/metadata/instance/compute/name" + query, "Metadata: true\nExpect: 100-continue"},
		{"GET", "HTTPS://h?/metadata/loadbalancer" + query, "Metadata: true"},
		{"CONNECT", "169.254.169.254:80", "Proxy-Connection: keep-alive"},
		{"OPTIONS", "*", "Host: other"},
		{"PRI", "*", "Metadata: true"},
		{"HEAD", "/metadata/instance/compute/", "Metadata: true\nTe: trailers\nTrailer: Metadata"},
	} {
		for pod := range senders {
			f.Add(byte(pod), s.method, s.target, s.header)
		}
	}
	f.Fuzz(func(t *testing.T, pod byte, method, target, header string) {
		if strings.ContainsAny(method+target, "\r\n") {
			t.Skip("that is more than one line, see FuzzFrontRaw")
		}
		var b strings.Builder
		b.WriteString(method + " " + target + " HTTP/1.1\r\n")
		if !strings.Contains(header, "Host:") {
			b.WriteString("Host: 169.254.169.254\r\n")
		}
		for line := range strings.FieldsFuncSeq(header, func(c rune) bool { return c == '\n' || c == '\r' }) {
			b.WriteString(line + "\r\n")
		}
		b.WriteString("\r\n")
		front.try(t, pod, b.String())
	})
}

// FuzzFrontRaw sends arbitrary bytes.
func FuzzFrontRaw(f *testing.F) {
	front := newFuzzedFront(f)
	get := func(target, header string) string {
		return "GET " + target + " HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n" + header + "\r\n"
	}
	const versions = "/metadata/versions"
	hidden := get("/metadata/identity/info?api-version=2018-02-01", "")
	for _, raw := range []string{
		get(tokenURL, ""),
		get(tokenURL, "") + get(versions, "") + hidden,
		get(versions, "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + hidden,
		get(versions, "Transfer-Encoding : chunked\r\nContent-Length: 0\r\n") + hidden,
		get(versions, "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n") + hidden,
		get(tokenURL, "Content-Length: 200\r\nExpect: 100-continue\r\n") + hidden,
		get(tokenURL, "Transfer-Encoding: chunked\r\n") + "3;x=\"\n\"\r\nabc\r\n0\r\nMetadata: true\r\n\r\n" + hidden,
		"\r\n\r\nPOST " + tokenURL + " HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + hidden,
		"GET " + versions + " HTTP/1.1\nHost: h\nX: a\n Metadata: true\n\n" + hidden,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
		"CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n" + hidden,
		"GET " + versions + "\r\n",
		"HEAD " + tokenURL + " HTTP/1.2\r\nHost: h\r\nMetadata: true\r\n\r\n" + hidden,
	} {
		for pod := range senders {
			f.Add(byte(pod), []byte(raw))
		}
	}
	f.Fuzz(func(t *testing.T, pod byte, raw []byte) { front.try(t, pod, string(raw)) })
}

// fuzzedFront is one front for all executions of a worker. It has an IMDS for what it
// passes through and another for the tokens that it fetches itself, so that the two cannot
// be confused.
type fuzzedFront struct {
	pods           *pipes
	slowPods       *pipes // to a server without the fast path
	passed, tokens *imdstest.Server
}

func newFuzzedFront(f *testing.F) *fuzzedFront {
	f.Helper()
	serve := func() (*imdstest.Server, *upstream.Upstream) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{one, two}, TokenSize: 100})
		server := imds.Start()
		f.Cleanup(server.Close)
		base, err := url.Parse(server.URL)
		require.NoError(f, err)
		up := upstream.New(upstream.Config{IMDS: base, PerSecond: 1 << 20, AtOnce: 1 << 10})
		f.Cleanup(up.Close)
		return imds, up
	}
	front := &fuzzedFront{pods: newPipes(), slowPods: newPipes()}
	var passThrough, fetch *upstream.Upstream
	front.passed, passThrough = serve()
	front.tokens, fetch = serve()
	// No limit to what IMDS may be asked, and little memory.
	tokens := tokencache.New(fetch.Token, tokencache.Config{Size: 16})
	f.Cleanup(tokens.Close)

	log := slog.New(slog.DiscardHandler)
	resolver := runResolver(f, podresolver.Config{PodWait: time.Nanosecond, Logger: log})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	f.Cleanup(func() { cancel(); running.Wait() })
	cfg := Config{Pods: resolver, Tokens: tokens, Upstream: passThrough, Logger: log}
	fast, slow := New(cfg), New(cfg)
	slow.heads = nil
	running.Go(func() { _ = fast.Serve(ctx, front.pods) })
	running.Go(func() { _ = slow.Serve(ctx, front.slowPods) })
	return front
}

// garbage follows what is fuzzed. It completes no request, whatever it follows, and
// makes the server close; and a server that looks whether its client is still there
// while it works finds a byte instead of the end.
const garbage = "\x00\r\n\r\n"

// try sends raw from a pod and checks what IMDS got, and what the pod got.
func (front *fuzzedFront) try(t *testing.T, pod byte, raw string) {
	t.Helper()
	from := senders[int(pod)%len(senders)]
	front.passed.Reset()
	front.tokens.Reset()
	answers := exchange(t, front.pods, from, raw)
	for _, call := range front.passed.Calls() {
		open := call.Path == "/metadata/versions" || call.Path == "/metadata/loadbalancer" ||
			call.Path == "/metadata/instance" || strings.HasPrefix(call.Path, "/metadata/instance/")
		if !open || call.Method != http.MethodGet || call.Subject != "" {
			t.Fatalf("%q was passed through as %+v", raw, call)
		}
	}
	for _, call := range front.tokens.Calls() {
		if from != bound || !ownTokenRequest(call) {
			t.Fatalf("%q of %s led to %+v", raw, from, call)
		}
	}
	checkAnswers(t, from, raw, answers)
}

// exchange sends parts one by one, and garbage, and returns all that is answered.
func exchange(t *testing.T, pods *pipes, from string, parts ...string) []byte {
	t.Helper()
	conn := pods.dial(from)
	defer conn.Close()
	var sending sync.WaitGroup
	sending.Go(func() {
		for _, part := range append(parts, garbage) {
			_, _ = io.WriteString(conn, part) // the server may have had enough
		}
		_ = conn.CloseWrite()
	})
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	answers, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Fatalf("%q: after %q: %v", parts, answers, err)
	}
	_ = conn.Close()
	sending.Wait()
	return answers
}

// FuzzFastPath sends arbitrary bytes several times, cut in two anywhere, to a server with the
// fast path and to one without.
func FuzzFastPath(f *testing.F) {
	front := newFuzzedFront(f)
	const id = "x-ms-client-request-id: 0a1b2c3d-0000-4000-8000-00000000000"
	for _, raw := range []string{
		get(tokenURL), get(tokenURL, "Connection: close"), get(tokenURL, "connection: Keep-Alive"),
		get(tokenURL, id+"1"), get(tokenURL, id+"1", "X-Y: "+id[len(id)-35:]+"1"), get(tokenURL, id+"g"),
		get(tokenURL+"&client_id="+one.ClientID, id+"1"), get(tokenURL + "&client_id=" + two.ClientID),
		get(tokenURL) + get(versions), get(tokenURL) + get(tokenURL, id+"1"), get(versions) + get(tokenURL, id+"1"),
		get(tokenURL, "Content-Length: 5") + "hello", get(tokenURL, "Transfer-Encoding: chunked") + "0\r\n\r\n",
		get(tokenURL, "Expect: 100-continue"), get(tokenURL, "Connection: upgrade", "Upgrade: h2c"),
		get(tokenURL, "X: y\r\n z"), strings.ReplaceAll(get(tokenURL), "\r\n", "\n"), get(tokenURL, "X:\t\x80"),
		strings.Replace(get(tokenURL), "HTTP/1.1", "HTTP/1.0", 1), get(tokenURL, "X-Forwarded-For: 1.2.3.4"),
		get(tokenURL+"&bypass_cache=false", id+"1"),
	} {
		f.Add(byte(0), []byte(raw), uint16(0), byte(1))
		f.Add(byte(0), []byte(raw), uint16(len(raw)/2), byte(3))
		f.Add(byte(0), []byte(raw), uint16(1), byte(3))
		f.Add(byte(1), []byte(raw), uint16(len(raw)-1), byte(2))
	}
	f.Fuzz(func(t *testing.T, pod byte, raw []byte, cut uint16, times byte) {
		from := senders[int(pod)%len(senders)]
		end := min(int(cut), len(raw))
		var parts []string
		for range times%4 + 1 {
			parts = append(parts, string(raw[:end]), string(raw[end:]))
		}
		slow := exchange(t, front.slowPods, from, parts...)
		if bytes.Contains(slow, []byte("HTTP/1.1 429 ")) {
			t.Skip("that depends on what was sent before")
		}
		for range 3 { // the first makes heads known, the second may use them
			if fast := exchange(t, front.pods, from, parts...); withoutTimes(fast) != withoutTimes(slow) {
				t.Fatalf("%q from %s was answered %q by the fast path instead of %q", parts, from, fast, slow)
			}
		}
	})
}

var times = regexp.MustCompile(`(?m)^Date: [^\r]*|expires_in":"[0-9]*"`)

func withoutTimes(answers []byte) string { return times.ReplaceAllString(string(answers), "") }

// ownTokenRequest reports whether this is how the front asks for a token that bound may
// have.
func ownTokenRequest(call imdstest.Call) bool {
	u, err := url.ParseRequestURI(call.Target)
	if err != nil || call.Method != http.MethodGet || u.Path != "/metadata/identity/oauth2/token" {
		return false
	}
	query := u.Query()
	named := query.Get("client_id") + query.Get("msi_res_id")
	return (named == one.ClientID || named == two.ResourceID) && (call.Subject == one.ClientID || call.Subject == two.ClientID)
}

var accessTokens = regexp.MustCompile(`"access_token":"([^"]*)"`)

// checkAnswers checks each answer of a connection: its shape, and whose token is in it.
func checkAnswers(t *testing.T, from, raw string, answers []byte) {
	t.Helper()
	for _, token := range accessTokens.FindAllSubmatch(answers, -1) {
		if subject := imdstest.Subject(string(token[1])); from != bound || subject != one.ClientID && subject != two.ClientID {
			t.Fatalf("%q gave %s a token of %q", raw, from, subject)
		}
	}
	for r := bufio.NewReader(bytes.NewReader(answers)); ; {
		if _, err := r.Peek(1); err != nil {
			return
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("%q was answered %q: %v", raw, answers, err)
		}
		// An answer to HEAD has the length of a body, and none.
		if next, _ := r.Peek(5); resp.StatusCode < 200 || len(next) == 0 || string(next) == "HTTP/" {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err == nil && ofNetHTTP(resp, body) {
			continue
		}
		if err != nil || !json.Valid(body) || resp.Header.Get("Content-Type") != contentType {
			t.Fatalf("%q was answered %q: %v", raw, answers, err)
		}
		if _, ok := resp.Header["Upgrade"]; ok || resp.StatusCode == http.StatusSwitchingProtocols {
			t.Fatalf("%q was answered %q", raw, answers)
		}
	}
}
