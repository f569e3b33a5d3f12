package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

var (
	one = imdstest.Identity{ClientID: "11111111-aaaa-4000-8000-000000000001", ObjectID: "o1", ResourceID: "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/one"}
	two = imdstest.Identity{ClientID: "22222222-bbbb-4000-8000-000000000002", ObjectID: "o2", ResourceID: "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/two"}
)

const tokenURL = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net/"

// world is a server on loopback with all the real rooms behind it.
type world struct {
	t    *testing.T
	addr string
	imds *imdstest.Server
	log  *testlog.Buffer

	server *Server

	stop    func() // tells the server to stop
	running sync.WaitGroup
}

// patience is for what must happen, on a machine that is busy with other things, too.
const patience = 30 * time.Second

// eventually waits until a condition holds, for patience at most.
func (w *world) eventually(is func() bool, what string, args ...any) {
	w.t.Helper()
	assert.Eventually(w.t, is, patience, time.Millisecond, append([]any{what}, args...)...)
}

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, imds: imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{one, two}}), log: &testlog.Buffer{}}
	log := slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))

	fakeIMDS := w.imds.Start()
	t.Cleanup(fakeIMDS.Close)
	base, err := url.Parse(fakeIMDS.URL)
	require.NoError(t, err)
	up := upstream.New(upstream.Config{IMDS: base, UserAgent: "nmi/test"})
	t.Cleanup(up.Close)
	tokens := tokencache.New(up.Token, tokencache.Config{})
	t.Cleanup(tokens.Close)

	cfg := Config{Pods: runResolver(t, podresolver.Config{Logger: log}), Tokens: tokens, Upstream: up, Logger: log}
	if change != nil {
		change(&cfg)
	}
	w.serve(cfg)
	return w
}

// serve serves on loopback until the test ends, or stop is called.
func (w *world) serve(cfg Config) {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(w.t, err)
	w.serveOn(ln, cfg)
}

// serveOn is serve on another listener.
func (w *world) serveOn(ln net.Listener, cfg Config) {
	w.t.Helper()
	w.addr = ln.Addr().String()
	w.server = New(cfg)
	var ctx context.Context
	ctx, w.stop = context.WithCancel(context.Background())
	w.t.Cleanup(func() { w.stop(); w.running.Wait() })
	w.running.Go(func() { assert.NoError(w.t, w.server.Serve(ctx, ln)) })
}

// runResolver returns newResolver's, which runs until the test ends, and is in sync.
func runResolver(tb testing.TB, cfg podresolver.Config) *podresolver.Resolver {
	tb.Helper()
	return run(tb, newResolver(tb, cfg))
}

func run(tb testing.TB, r *podresolver.Resolver) *podresolver.Resolver {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	tb.Cleanup(func() { cancel(); running.Wait() })
	select {
	case <-r.Synced():
	case <-time.After(patience):
		tb.Fatal("not synced: ", r.Ready())
	}
	return r
}

// newResolver returns a resolver that knows the pods of the test node, and waits 50 ms for
// others unless cfg says otherwise.
func newResolver(tb testing.TB, cfg podresolver.Config) *podresolver.Resolver {
	tb.Helper()
	if cfg.PodWait == 0 {
		cfg.PodWait = 50 * time.Millisecond
	}
	cfg.Node = resolvertest.Node
	r, err := podresolver.New(newCluster().Sources(), cfg)
	require.NoError(tb, err)
	return r
}

// newCluster returns the pods of the test node, and what is bound to them.
func newCluster() *resolvertest.Cluster {
	principal := resolvertest.Identity("principal", "c3", "")
	principal.Spec.Type = aadpodidentity.ServicePrincipal
	addon := map[string]string{"app": "addon"}
	return resolvertest.NewCluster(
		resolvertest.Pod("bound", bound, "both"),
		resolvertest.Pod("also-bound", alsoBound, "both"),
		resolvertest.Pod("unbound", unbound, "nothing"),
		resolvertest.With(resolvertest.Pod("excepted", excepted, ""), func(p *corev1.Pod) { p.Labels = addon }),
		resolvertest.Pod("secret", secret, "secret"),
		resolvertest.Identity("one", one.ClientID, one.ResourceID),
		resolvertest.Identity("two", "", two.ResourceID),
		principal,
		resolvertest.Binding("a", "both", "one"),
		resolvertest.Binding("b", "both", "two"),
		resolvertest.Binding("c", "secret", "principal"),
		resolvertest.Exception("addons", addon),
	)
}

// send writes raw bytes from a pod's address and reads one answer.
func (w *world) send(from, raw string) (*http.Response, string) {
	w.t.Helper()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
	conn, err := dialer.DialContext(w.t.Context(), "tcp", w.addr)
	require.NoError(w.t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, raw)
	require.NoError(w.t, err)
	method, _, _ := strings.Cut(raw, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	require.NoError(w.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(w.t, err)
	return resp, string(body)
}

// get sends a GET with the metadata header.
func (w *world) get(from, target string) (*http.Response, string) {
	w.t.Helper()
	return w.send(from, request("GET", target, "Metadata: true"))
}

func request(method, target string, headers ...string) string {
	return method + " " + target + " HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n" + strings.Join(append(headers, "\r\n"), "\r\n")
}

// tokenSubject reads the subject of a token answer; "" if it has none.
func tokenSubject(body string) string {
	var in struct {
		Token string `json:"access_token"`
	}
	_ = json.Unmarshal([]byte(body), &in)
	return imdstest.Subject(in.Token)
}
