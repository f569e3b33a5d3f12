package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/cmd/nmi/doctor"
	"github.com/podidentity/nmi/cmd/nmi/status"
	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

const (
	podAddr   = "10.244.0.7"
	cartID    = "ca470000-0000-4000-8000-000000000001"
	reportID  = "4e904700-0000-4000-8000-000000000002"
	unknownID = "dead0000-0000-4000-8000-000000000003" // that IMDS does not know
)

// aPod is the pod of the situations. All objects are in namespace shop.
func aPod(changes ...func(*corev1.Pod)) *corev1.Pod {
	p := resolvertest.Pod("p", podAddr, "cart")
	p.Spec.Containers = []corev1.Container{{Name: "app"}}
	return resolvertest.With(p, changes...)
}

func label(key, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Labels = map[string]string{key: value} }
}

func deleted(after time.Duration) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now().Add(after)} }
}

func ended(p *corev1.Pod) {
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
}

// situation is one that operators ask about: what the agent answers to the pod and logs,
// and what nmi explain prints.
type situation struct {
	config  podresolver.Config
	objects []runtime.Object // beside AzureIdentity and AzureIdentityBinding "cart"
	breaks  func(*podresolver.Sources)
	doubt   error  // what the node's links say
	asks    string // client ID

	answer  string // as proxy.Answer has it; or "200 " and the token's client ID
	log     []string
	explain []string
	not     []string // neither in the log nor in the explanation
}

var situations = map[string]situation{
	"all is well": {
		objects: []runtime.Object{aPod()}, answer: "200 " + cartID,
		explain: []string{"gets by default AzureIdentity shop/cart", `AzureIdentityBinding "cart" has the selector "cart"`, "tokens      https://vault.azure.net/ for another "},
	},
	"IMDS does not know the identity": {
		objects: []runtime.Object{aPod(label("aadpodidbinding", "odd")), resolvertest.Identity("odd", unknownID, ""), resolvertest.Binding("odd", "odd", "odd")},
		answer:  "400 invalid_request: Identity not found", log: []string{"identity shop/odd", "IMDS answered 400 invalid_request: Identity not found"},
		explain: []string{"gets by default AzureIdentity shop/odd", "reason: IdentityUnknownToIMDS", "fix: assign the identity to the node's scale set"},
	},
	"past its grace": {
		objects: []runtime.Object{aPod(deleted(-time.Minute))}, answer: "503 temporarily_unavailable: The pod of this address is not known yet",
		log:     []string{"no pod on this node has this address"},
		explain: []string{"would get AzureIdentity shop/cart", podAddr + " no longer belongs to it: it is being deleted, and its grace period ended at"},
		not:     []string{"\ngets"},
	},
	"terminating, its containers have ended": {
		objects: []runtime.Object{aPod(deleted(time.Hour), ended)}, answer: "503 temporarily_unavailable: The pod of this address is not known yet",
		explain: []string{"would get", podAddr + " no longer belongs to it: it is being deleted, and all its containers have terminated"},
	},
	"terminating, and running": {
		objects: []runtime.Object{aPod(deleted(time.Hour))}, answer: "200 " + cartID,
		explain: []string{"gets by default AzureIdentity shop/cart"},
	},
	"two pods with one address": {
		objects: []runtime.Object{aPod(), resolvertest.Pod("q", podAddr, "cart")}, answer: "503 temporarily_unavailable: The address is claimed by more than one pod",
		log:     []string{"several live pods claim this address", "shop/p", "shop/q"},
		explain: []string{"would get", "several live pods claim this address (" + podAddr + "): shop/"},
	},
	"an address that is a younger pod's": {
		objects: []runtime.Object{aPod(deleted(time.Hour)), resolvertest.Pod("q", podAddr, "cart")}, answer: "200 " + cartID, // q's
		explain: []string{"is answered 503 temporarily_unavailable", podAddr + " belongs to shop/q, which is newer"},
	},
	"no address": {
		objects: []runtime.Object{aPod(func(p *corev1.Pod) { p.Status.PodIP = "" })}, answer: "503 temporarily_unavailable: The pod of this address is not known yet",
		explain: []string{"pod shop/p\n", "would get", "its status has no address"},
	},
	"a caller that its link does not confirm": {
		objects: []runtime.Object{aPod()}, doubt: fmt.Errorf("%w: eth7 appeared later", podresolver.ErrUnconfirmed),
		answer: "503 temporarily_unavailable: The pod of this address is not known yet", log: []string{"eth7 appeared later"}, explain: []string{"would get", "eth7 appeared later"},
	},
	"a network that tells no pods apart": {
		objects: []runtime.Object{aPod()}, doubt: fmt.Errorf("%w: bridge br0", proxy.ErrSource),
		answer: "400 invalid_request: This node's network does not show which pod is calling; ask the operators of the cluster", log: []string{"bridge br0"}, explain: []string{"bridge br0"},
	},
	"not in sync": {
		objects: []runtime.Object{aPod()}, breaks: func(s *podresolver.Sources) { s.Bindings = forbidden{} },
		answer:  "503 temporarily_unavailable: The agent is not in sync with the API server yet",
		log:     []string{"the agent has not synced with the API server yet: azureidentitybindings.aadpodidentity.k8s.io: the agent's service account may not list and watch this resource"},
		explain: []string{"the agent has not synced with the API server yet: azureidentitybindings.aadpodidentity.k8s.io: the agent's service account may not list and watch this resource: apply its ClusterRole"},
		not:     []string{"no pod on this node has this address"},
	},
	"stale": {
		config: podresolver.Config{MaxStaleness: time.Millisecond}, objects: []runtime.Object{aPod()},
		answer: "503 temporarily_unavailable: Pod and identity data is stale", log: []string{"pod and identity data is stale"},
		explain: []string{"pod and identity data is stale", "would get"},
	},
	"no label": {
		objects: []runtime.Object{aPod(label("app", "x"))}, answer: "400 invalid_request: Identity not found",
		log: []string{`it has no label "aadpodidbinding"`}, explain: []string{"has no identity", `it has no label "aadpodidbinding"`},
	},
	"a label key in another case": {
		objects: []runtime.Object{aPod(label("AadPodIdBinding", "cart"))}, answer: "400 invalid_request: Identity not found",
		log: []string{`its label "AadPodIdBinding" differs in case from "aadpodidbinding"`}, explain: []string{`its label "AadPodIdBinding" differs in case from "aadpodidbinding"`},
	},
	"a selector in another case": {
		objects: []runtime.Object{aPod(label("aadpodidbinding", "Cart"))}, answer: "400 invalid_request: Identity not found",
		log:     []string{`no AzureIdentityBinding in namespace "shop" has the selector "Cart"`, `AzureIdentityBinding shop/cart does not match: its selector "cart" differs in case`},
		explain: []string{`AzureIdentityBinding shop/cart does not match: its selector "cart" differs in case`},
	},
	"a binding of another namespace": {
		objects: []runtime.Object{aPod(label("aadpodidbinding", "far")), resolvertest.In("bank", resolvertest.Binding("far", "far", "cart"))}, answer: "400 invalid_request: Identity not found",
		log: []string{"AzureIdentityBinding bank/far does not match: it is in another namespace"}, explain: []string{"AzureIdentityBinding bank/far does not match: it is in another namespace"},
	},
	"an identity of another namespace": {
		objects: []runtime.Object{aPod(label("aadpodidbinding", "far")), resolvertest.Binding("far", "far", "away"), resolvertest.In("bank", resolvertest.Identity("away", reportID, ""))}, answer: "400 invalid_request: Identity not found",
		log:     []string{`AzureIdentityBinding "far" names AzureIdentity "away", which does not exist`, `AzureIdentity bank/away does not match AzureIdentityBinding "far": it is in another namespace`},
		explain: []string{`AzureIdentity bank/away does not match AzureIdentityBinding "far": it is in another namespace`},
	},
	"an exception's key in another case": {
		objects: []runtime.Object{aPod(label("App", "x")), resolvertest.Exception("e", map[string]string{"app": "x"})}, answer: "400 invalid_request: Identity not found",
		log: []string{`AzurePodIdentityException shop/e does not apply: the pod's label "App" differs in case from "app"`}, explain: []string{`the pod's label "App" differs in case from "app"`},
	},
	"an exception of another namespace": {
		objects: []runtime.Object{aPod(label("app", "x")), resolvertest.In("bank", resolvertest.Exception("e", map[string]string{"app": "x"}))}, answer: "400 invalid_request: Identity not found",
		log: []string{"AzurePodIdentityException bank/e lists its label app=x but does not apply: it is in another namespace"}, explain: []string{"AzurePodIdentityException bank/e lists its label app=x"},
	},
	"another ID than is bound": {
		objects: []runtime.Object{aPod()}, asks: reportID, answer: "400 invalid_request: Identity not found",
		log:     []string{`none of those bound to it has the requested client ID "` + reportID + `": AzureIdentity shop/cart (user-assigned managed identity, client ID ` + cartID + ")"},
		explain: []string{`requests client ID "` + reportID + `"`, "may use AzureIdentity shop/cart", "reason: RequestedIdentityMissing", "fix: request an identity that the pod has"},
	},
	"several, strictly": {
		config: podresolver.Config{StrictSelection: true}, objects: []runtime.Object{aPod(), resolvertest.Identity("report", reportID, ""), resolvertest.Binding("report", "cart", "report")},
		answer: "400 invalid_request: Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request",
		log:    []string{"the pod has several identities and the request names none"}, explain: []string{"may use AzureIdentity shop/cart", "may use AzureIdentity shop/report", "a request must name one"},
	},
	"a malformed client ID": {
		objects: []runtime.Object{aPod(label("aadpodidbinding", "odd")), resolvertest.Identity("odd", "cart", ""), resolvertest.Binding("odd", "odd", "odd")}, answer: "400 invalid_request: Identity not found",
		log: []string{`has client ID "cart", which is not a GUID`}, explain: []string{`has client ID "cart", which is not a GUID`},
	},
	"MIC has not assigned it": {
		config: podresolver.Config{Mode: podresolver.Standard}, objects: []runtime.Object{aPod()},
		answer: "503 temporarily_unavailable: The identity is not assigned to the pod yet", log: []string{"MIC has not assigned the identity to this pod yet"},
		explain: []string{"will get AzureIdentity shop/cart", "once MIC has assigned it"},
	},
	"an annotated service account": {
		config:  podresolver.Config{Federation: podresolver.Federation{ServiceAccounts: true, TenantID: "t"}},
		objects: []runtime.Object{aPod(label("app", "x")), resolvertest.ServiceAccount("cart", map[string]string{"azure.workload.identity/client-id": reportID})},
		answer:  "200 " + reportID, explain: []string{"account", "ServiceAccount shop/cart gives it client ID " + reportID, "gets by default ServiceAccount shop/cart (federated, client ID " + reportID + ", tenant t)"},
	},
	"an annotation without a tenant": {
		config:  podresolver.Config{Federation: podresolver.Federation{ServiceAccounts: true}},
		objects: []runtime.Object{aPod(label("app", "x")), resolvertest.ServiceAccount("cart", map[string]string{"azure.workload.identity/client-id": reportID})},
		answer:  "400 invalid_request: Identity not found", log: []string{"ServiceAccount shop/cart is federated and has no tenant ID: give it one, or all of them by --federation-tenant-id"},
		explain: []string{"reason: ServiceAccountUnusable", "fix: correct the annotations of ServiceAccount shop/cart"},
	},
	"a service account whose event is late": {
		config:  podresolver.Config{Federation: podresolver.Federation{ServiceAccounts: true, TenantID: "t"}},
		objects: []runtime.Object{aPod(label("app", "x"))}, answer: "503 temporarily_unavailable: The service account of the pod is not known yet",
		log: []string{"the pod's service account is not known yet: ServiceAccount shop/cart"}, explain: []string{"ServiceAccount shop/cart is not known", "reason: ServiceAccountUnknown"},
	},
	"excepted": {
		objects: []runtime.Object{aPod(), resolvertest.Exception("e", map[string]string{"aadpodidbinding": "cart"})}, answer: "200 " + nodeToken,
		explain: []string{`is excepted by "e"`, `AzurePodIdentityException "e" lists its label aadpodidbinding=cart`}, not: []string{"is answered"},
	},
	"excepted, past its grace": {
		objects: []runtime.Object{aPod(deleted(-time.Minute)), resolvertest.Exception("e", map[string]string{"aadpodidbinding": "cart"})}, answer: "503 temporarily_unavailable: The pod of this address is not known yet",
		explain: []string{"its grace period ended at"},
	},
	"azure-workload-identity's variables": {
		objects: []runtime.Object{aPod(func(p *corev1.Pod) {
			p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "AZURE_CLIENT_ID"}, {Name: "AZURE_FEDERATED_TOKEN_FILE"}}
		})}, answer: "200 " + cartID,
		explain: []string{"it is set up for Azure Workload Identity (the variable AZURE_FEDERATED_TOKEN_FILE)", "never send requests to IMDS"},
	},
	"azure-workload-identity's label": {
		objects: []runtime.Object{aPod(func(p *corev1.Pod) { p.Labels["azure.workload.identity/use"] = "true" })}, answer: "200 " + cartID,
		explain: []string{"it is set up for Azure Workload Identity (the label azure.workload.identity/use=true)"},
	},
	"on the host network": {
		objects: []runtime.Object{aPod(func(p *corev1.Pod) { p.Spec.HostNetwork = true })}, answer: "503 temporarily_unavailable: The pod of this address is not known yet",
		explain: []string{"is on the host network: its requests go to IMDS directly"}, not: []string{"may use", "gets by default", "is answered"},
	},
}

const nodeToken = "the node's"

// forbidden is a source that the agent may not read.
type forbidden struct{ cache.ListerWatcher }

func (forbidden) List(metav1.ListOptions) (runtime.Object, error) {
	return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "azureidentitybindings"}, "", errors.New("no role"))
}

func (forbidden) IsWatchListSemanticsUnSupported() bool { return true }

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// unescaped is a log with the quotes that its texts have.
func unescaped(log *testlog.Buffer) string { return strings.ReplaceAll(log.String(), `\"`, `"`) }

// agentAnswer is what an agent answers to the pod, as proxy.Answer has it.
func agentAnswer(t *testing.T, server *proxy.Server, query string) string {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net/"+query, nil)
	r.RemoteAddr = podAddr + ":40000"
	r.Header.Set("Metadata", "true")
	server.ServeHTTP(w, r)
	var said struct {
		ClientID    string `json:"client_id"`
		Code        string `json:"error"`
		Description string `json:"error_description"`
	}
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &said), w.Body.String())
	if w.Code == http.StatusOK {
		return "200 " + said.ClientID
	}
	return fmt.Sprintf("%d %s: %s", w.Code, said.Code, said.Description)
}

// TestExplainAndTheAgentAgree: one code path decides both.
func TestExplainAndTheAgentAgree(t *testing.T) {
	for name, tc := range situations {
		t.Run(name, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			log := &testlog.Buffer{}
			logger := slog.New(slog.NewTextHandler(log, nil))
			cluster := resolvertest.NewCluster(append([]runtime.Object{resolvertest.Identity("cart", cartID, ""), resolvertest.Binding("cart", "cart", "cart")}, tc.objects...)...)
			defer cluster.Close()
			sources := podresolver.Sources(cluster.Sources())
			if tc.breaks != nil {
				tc.breaks(&sources)
			}
			cfg := tc.config
			cfg.Node, cfg.PodWait, cfg.IdentityWait, cfg.Logger = "node1", 20*time.Millisecond, 20*time.Millisecond, logger
			resolver, err := podresolver.New(sources, cfg)
			require.NoError(t, err)
			tokens := tokencache.New(func(_ context.Context, r tokencache.Request) (*tokencache.Token, error) {
				if r.ClientID == unknownID {
					return nil, &upstream.Error{Source: "IMDS", Status: 400, Code: "invalid_request", Description: "Identity not found"}
				}
				now := time.Now()
				return &tokencache.Token{AccessToken: "t", ClientID: r.ClientID, NotBefore: now, ExpiresOn: now.Add(time.Hour), ExtExpiresOn: now.Add(time.Hour)}, nil
			}, tokencache.Config{})
			defer tokens.Close()
			confirm := func(netip.Addr, *podresolver.Pod) error { return tc.doubt }
			server := proxy.New(proxy.Config{
				Pods: resolver, Tokens: tokens, Logger: logger,
				Upstream: roundTrip(func(*http.Request) (*http.Response, error) {
					return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(`{"client_id":"` + nodeToken + `"}`))}, nil
				}),
				CheckSource: func(addr netip.Addr, _ int, pod *podresolver.Pod) error { return confirm(addr, pod) },
			})
			agent := status.Parts{Pods: resolver, Confirm: confirm, Tokens: tokens, Server: server}
			socket := filepath.Join(t.TempDir(), "probe.sock")
			page := newPage(flagProbeSocket, logger, func(ctx context.Context) (pageListener, error) { return listenUnix(ctx, socket) })
			page.handler = explainHandler(agent, cfg, doctor.Settings{}, http.NotFoundHandler())
			var running sync.WaitGroup
			running.Go(func() { page.run(ctx) })
			running.Go(func() { resolver.Run(ctx) })
			defer func() { stop(); running.Wait(); page.close() }()
			require.Eventually(t, func() bool {
				status, err := getPage(ctx, socket, "/", io.Discard)
				return err == nil && status == http.StatusNotFound
			}, 30*time.Second, time.Millisecond)
			switch {
			case tc.breaks != nil:
				require.Eventually(t, func() bool { return strings.Contains(resolver.Ready().Error(), "service account") }, 30*time.Second, time.Millisecond)
			default:
				<-resolver.Synced()
			}
			if cfg.MaxStaleness > 0 {
				require.Eventually(t, func() bool { return resolver.Ready() != nil }, 30*time.Second, time.Millisecond)
			}

			query := ""
			if tc.asks != "" {
				query = "&client_id=" + tc.asks
			}
			answer := agentAnswer(t, server, query)
			assert.Equal(t, tc.answer, answer)
			for _, text := range tc.log {
				assert.Contains(t, unescaped(log), text)
			}

			var explained string
			pod, err := explain(ctx, question{"shop/p", tc.asks}, socket, podresolver.Config{}, nil, func(note string) { t.Error(note) })
			if tc.breaks != nil {
				require.Error(t, err)
				explained = err.Error()
			} else {
				require.NoError(t, err)
				explained = printed(t, pod)
			}
			for _, text := range tc.explain {
				assert.Contains(t, explained, text)
			}
			for _, text := range tc.not {
				assert.NotContains(t, unescaped(log)+explained, text)
			}
			differs := strings.HasPrefix(name, "an address that is a younger pod's") || // the request is that pod's
				tc.breaks != nil || strings.HasPrefix(name, "IMDS") || strings.HasPrefix(name, "on the host network")
			switch status, id, _ := strings.Cut(answer, " "); {
			case differs:
			case id == nodeToken:
				assert.Contains(t, explained, "is excepted by")
			case status == "200":
				assert.Regexp(t, `(?m)^gets by default .*`+id, explained)
			default:
				assert.Contains(t, explained, "\nis answered "+answer+"\n")
				assert.NotRegexp(t, "(?m)^gets", explained)
				assert.Contains(t, explained, "\nreason: "+pod.Reason+"\nfix: ")
				assert.Contains(t, log.String(), "reason="+pod.Reason+" ", "the same word")
			}

			// Reading the cluster says the same, as far as the objects show it.
			if tc.doubt == nil && cfg.MaxStaleness == 0 {
				read, err := podresolver.Read(ctx, sources, cfg)
				if tc.breaks != nil {
					require.ErrorContains(t, err, "the agent's service account may not list and watch this resource", "at once")
					return
				}
				require.NoError(t, err)
				text, err := status.Parts{Pods: read}.Pod("shop", "p", podresolver.Selector{ClientID: tc.asks})
				require.NoError(t, err)
				if !strings.HasPrefix(name, "IMDS") { // which answered the agent
					pod.Tokens, pod.TokensHeld, pod.Refusals, pod.State = nil, 0, nil, text.State
					assert.Equal(t, printed(t, pod), printed(t, &explanation{Pod: text}))
				}
			}
		})
	}
}

// printed is what nmi explain prints.
func printed(t *testing.T, e *explanation) string {
	t.Helper()
	var out strings.Builder
	require.NoError(t, e.print(&out, outputTable))
	return out.String()
}
