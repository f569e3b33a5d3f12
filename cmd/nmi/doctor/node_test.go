package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
)

// The checks ask for the programs of a cgroup of the tests' own, and for no other.
func TestMain(m *testing.M) {
	cgroups = nil
	testbed.Main(m.Run)
}

// patience is the timeout for what must happen, also on a busy machine.
const patience = 30 * time.Second

// node is a healthy node: the agent's rules are in place, and a metadata service, an API server
// and what the agent serves answer.
type node struct {
	t        *testing.T
	network  *testbed.Network
	cfg      Config
	settings Settings // as the agent says

	mu      sync.Mutex // guards all following fields
	status  int        // of /readyz
	ready   string
	statusz string // JSON
	imds    http.HandlerFunc
	date    time.Time // of the API server; zero for now
	pods    []corev1.Pod
	rights  []string                       // beside those of deploy/manifests, as reviewed
	ids     []metav1.PartialObjectMetadata // AzureIdentities, a page each
}

// reviewed is a right in short: verb, resource and namespace.
func reviewed(a *authorizationv1.ResourceAttributes) string {
	resource := a.Resource
	if a.Subresource != "" {
		resource += "/" + a.Subresource
	}
	return strings.TrimSpace(a.Verb + " " + resource + " " + a.Namespace)
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, status: http.StatusOK, ready: "ready\nredirect mode dnat: set by flag\n\n"}
	var err error
	n.network, err = testbed.NewNetwork()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, n.network.Close()) })
	n.imds = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }
	ln, err := n.network.Metadata.Listen(testbed.MetadataAddress)
	require.NoError(t, err)
	n.serve(ln, func(w http.ResponseWriter, r *http.Request) { n.handler()(w, r) })

	n.settings = Settings{
		Node: "node1", Mode: podresolver.Managed, HandoverDir: t.TempDir(),
		Rules: iptables.Config{
			Mode: iptables.DNAT, Metadata: netip.MustParseAddrPort(testbed.MetadataAddress), Port: 2579,
			Address: iptables.DefaultAddress, Interval: time.Minute, Backend: iptables.NFT, BlockWireserver: true,
		},
		Ports: []Port{
			{Flag: "nmi-port", Addr: netip.MustParseAddrPort("0.0.0.0:2579")},
			{Flag: "http-probe-port", Addr: netip.MustParseAddrPort("127.0.0.1:8085"), Page: "/healthz"},
			{Flag: "prometheus-port", Addr: netip.MustParseAddrPort("0.0.0.0:9090"), Page: "/metrics"},
		},
	}
	n.cfg = Config{
		Socket: "/probe.sock", Settings: Settings{Rules: n.settings.Rules, Ports: n.settings.Ports},
		API: &rest.Config{Host: n.apiServer().URL}, Ask: n.ask,
	}
	n.redirect(n.settings.Rules)
	return n
}

func (n *node) handler() http.HandlerFunc {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.imds
}

// serve serves until the test ends.
func (n *node) serve(ln net.Listener, handler http.HandlerFunc) {
	srv := &http.Server{Handler: handler}
	go func() { _ = srv.Serve(ln) }()
	n.t.Cleanup(func() { _ = srv.Close() })
}

// agentServes serves the agent's ports.
func (n *node) agentServes() {
	for addr, text := range map[string]string{"0.0.0.0:2579": "", "127.0.0.1:8085": "Active", "0.0.0.0:9090": "nmi_ready 1\n"} {
		n.listens(addr, text)
	}
}

// listens serves a text on a port until the test ends.
func (n *node) listens(addr, text string) {
	n.t.Helper()
	ln, err := net.Listen("tcp4", addr)
	require.NoError(n.t, err)
	n.serve(ln, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
}

// ask is what the agent says.
func (n *node) ask(_ context.Context, page string) (int, string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch page {
	case ConfigPage:
		text, err := json.Marshal(AgentPage{Doctor: n.settings})
		return http.StatusOK, string(text), err
	case readyPage:
		return n.status, n.ready, nil
	case statusPage:
		return http.StatusOK, n.statusz, nil
	}
	return http.StatusNotFound, "", nil
}

func (n *node) apiServer() *httptest.Server {
	mux := http.NewServeMux()
	serve := func(path string, object func() any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			n.mu.Lock()
			defer n.mu.Unlock()
			if !n.date.IsZero() {
				w.Header().Set("Date", n.date.UTC().Format(http.TimeFormat))
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(object())
		})
	}
	serve("GET /version", func() any { return map[string]string{"gitVersion": "v1.37.0"} })
	mux.HandleFunc("GET /api/v1/pods", func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		assert.Equal(n.t, "spec.nodeName=node1,status.phase!=Succeeded,status.phase!=Failed", r.FormValue("fieldSelector"))
		var page corev1.PodList
		at, _ := strconv.Atoi(r.FormValue("continue"))
		end := min(at+2, len(n.pods))
		if page.Items = n.pods[at:end]; end < len(n.pods) {
			page.Continue = strconv.Itoa(end)
		}
		_ = json.NewEncoder(w).Encode(page)
	})
	mux.HandleFunc("GET /apis/aadpodidentity.k8s.io/v1/azureidentities", func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		var page metav1.PartialObjectMetadataList
		if at, _ := strconv.Atoi(r.FormValue("continue")); at < len(n.ids) {
			page.Items, page.Continue = n.ids[at:at+1], strconv.Itoa(at+1)
		}
		_ = json.NewEncoder(w).Encode(page)
	})
	mux.HandleFunc("POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", func(w http.ResponseWriter, r *http.Request) {
		var review authorizationv1.SelfSubjectAccessReview
		assert.NoError(n.t, json.NewDecoder(r.Body).Decode(&review))
		n.mu.Lock()
		defer n.mu.Unlock()
		asked := reviewed(review.Spec.ResourceAttributes)
		review.Status.Allowed = slices.Contains(n.rights, asked) || !strings.Contains(asked, "serviceaccounts") && !strings.Contains(asked, "impersonate")
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(review)
	})
	server := httptest.NewServer(mux)
	n.t.Cleanup(server.Close)
	return server
}

// redirect puts the agent's rules in place, and leaves them there until the test ends.
func (n *node) redirect(cfg iptables.Config) {
	n.t.Helper()
	cfg.Logger = slog.New(slog.DiscardHandler)
	r, err := iptables.New(cfg)
	require.NoError(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	defer running.Wait()
	defer cancel()
	require.Eventually(n.t, func() bool { return r.Status().Err == nil }, patience, 5*time.Millisecond)
	n.t.Cleanup(func() { assert.NoError(n.t, iptables.Cleanup(context.Background(), cfg)) })
}

// addPod adds a pod to the node and to the API server.
func (n *node) addPod(shape testbed.Shape, changes ...func(*corev1.Pod)) {
	n.t.Helper()
	const addr = "10.244.0.7"
	p, err := n.network.AddPod(addr, shape)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { assert.NoError(n.t, p.Close()) })
	pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p-" + addr}, Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: addr}}
	for _, change := range changes {
		change(&pod)
	}
	n.mu.Lock()
	n.pods = append(n.pods, pod)
	n.mu.Unlock()
}

// command runs a command of the node.
func (n *node) command(line string) {
	n.t.Helper()
	fields := strings.Fields(line)
	out, err := exec.Command(fields[0], fields[1:]...).CombinedOutput()
	require.NoError(n.t, err, "%s: %s", line, out)
}

// nft writes a table of another program until the test ends.
func (n *node) nft(table string) {
	n.t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(table)
	out, err := cmd.CombinedOutput()
	require.NoError(n.t, err, string(out))
	n.t.Cleanup(func() { n.command("nft delete " + strings.Join(strings.Fields(table)[:3], " ")) })
}

// ownCgroup makes a cgroup of the test's own, below one of the test's own.
func ownCgroup(t *testing.T) (parent, child string) {
	t.Helper()
	root, err := cgroup2([]string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"})
	require.NoError(t, err)
	parent = filepath.Join(root, fmt.Sprintf("nmi-doctor-%d", os.Getpid()))
	child = filepath.Join(parent, "pod")
	require.NoError(t, os.Mkdir(parent, 0o755))
	t.Cleanup(func() { assert.NoError(t, os.Remove(parent)) })
	require.NoError(t, os.Mkdir(child, 0o755))
	t.Cleanup(func() { assert.NoError(t, os.Remove(child)) })
	return parent, child
}
