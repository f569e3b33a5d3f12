package status

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

var cart = imdstest.Identity{ClientID: "5c0ca47e-1d00-4000-8000-000000000001"}

// parts are those of an agent of a node with these pods, with a binding of cart and one of an
// identity that IMDS does not know.
func parts(t *testing.T, pods ...*corev1.Pod) (Parts, *resolvertest.Cluster, *testlog.Buffer) {
	t.Helper()
	log := new(testlog.Buffer)
	logger := log.Logger()
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{cart}})
	fake := imds.Start()
	t.Cleanup(fake.Close)
	base, err := url.Parse(fake.URL)
	require.NoError(t, err)
	cluster := resolvertest.NewCluster(
		resolvertest.Identity("cart", cart.ClientID, ""), resolvertest.Binding("cart", "cart", "cart"),
		resolvertest.Identity("odd", "dead0000-0000-4000-8000-000000000003", ""), resolvertest.Binding("odd", "odd", "odd"),
		resolvertest.Exception("e", map[string]string{"app": "addon"}),
	)
	for _, pod := range pods {
		cluster.Add(pod)
	}
	t.Cleanup(cluster.Close)
	resolver, err := podresolver.New(cluster.Sources(), podresolver.Config{Node: resolvertest.Node, PodWait: time.Millisecond, Logger: logger})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { resolver.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	<-resolver.Synced()
	up := upstream.New(upstream.Config{IMDS: base, Logger: logger})
	t.Cleanup(up.Close)
	tokens := tokencache.New(up.Token, tokencache.Config{})
	t.Cleanup(tokens.Close)
	return Parts{
		Version: "v1", Node: resolvertest.Node, Mode: podresolver.Managed, Started: time.Now().Add(-time.Hour),
		Ready: func() error { return errors.New("one\ntwo") }, Notes: func() []string { return []string{"a note"} },
		Rules: func() iptables.Status {
			return iptables.Status{Mode: iptables.DNAT, Backend: "nft", InPlace: map[string]bool{"routing": false, "redirect": true, "guard": true}}
		},
		Pods: resolver, Upstream: up, Tokens: tokens, Server: proxy.New(proxy.Config{Pods: resolver, Tokens: tokens, Upstream: up, Logger: logger}),
	}, cluster, log
}

// ask sends a pod's request for a token, and returns the token.
func (p Parts) ask(t *testing.T, from, resource string) (token string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="+resource, nil)
	r.RemoteAddr = from + ":40000"
	r.Header.Set("Metadata", "true")
	w := httptest.NewRecorder()
	p.Server.ServeHTTP(w, r)
	var answer struct {
		Token string `json:"access_token"`
	}
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &answer))
	return answer.Token
}

func TestSnapshot(t *testing.T) {
	pod := resolvertest.Pod
	addon, host := pod("addon", "10.244.0.5", ""), pod("host", "10.0.0.4", "cart")
	addon.Labels = map[string]string{"app": "addon"}
	host.Spec.HostNetwork = true
	p, _, log := parts(t, pod("cart", "10.244.0.1", "cart"), pod("odd", "10.244.0.2", "odd"), pod("shouting", "10.244.0.3", "CART"), pod("quiet", "10.244.0.4", ""), addon, host, pod("asking", "10.244.0.6", ""))
	secret := p.ask(t, "10.244.0.1", "https://vault.azure.net")
	require.NotEmpty(t, secret)
	for _, from := range []string{"10.244.0.2", "10.244.0.6", "10.244.0.99"} {
		require.Empty(t, p.ask(t, from, "r"))
	}
	s := p.Snapshot()

	assert.False(t, s.Agent.Ready)
	assert.Equal(t, []string{"one", "two"}, s.Agent.Problems)
	assert.Equal(t, Rules{Mode: "dnat", Backend: "nft", Parts: []Part{{"redirect", true}, {"guard", true}, {"routing", false}}}, s.Rules)
	assert.Equal(t, line{"fences", Warning, "routing not in place; guard holds alone"}, s.fences())
	assert.True(t, s.Cluster.Synced)
	assert.Len(t, s.Cluster.Watches, 4)
	assert.Equal(t, Tokens{Held: 1, Failing: 1}, s.Tokens)
	assert.Equal(t, upstream.DefaultAtOnce, s.Upstream.AtOnce)
	states := make(map[string]State)
	for _, pod := range s.Pods {
		states[pod.Name] = pod.State
	}
	assert.Equal(t, map[string]State{"cart": OK, "odd": Failed, "shouting": Failed, "quiet": None, "addon": OK, "host": None, "asking": Failed}, states)
	assert.Equal(t, Failed, s.Pods[0].State, "what needs attention first")
	if assert.Len(t, s.Others, 1) {
		assert.Equal(t, "10.244.0.99", s.Others[0].Address)
		assert.Equal(t, podresolver.PodUnknown, s.Others[0].Refusals[0].Reason)
	}
	of := func(name string) Pod {
		got, err := p.Pod("shop", name, podresolver.Selector{})
		require.NoError(t, err)
		return got
	}
	if tokens := of("cart").Tokens; assert.Len(t, tokens, 1) {
		assert.Equal(t, "https://vault.azure.net", tokens[0].Resource)
		assert.Equal(t, cart.ClientID, tokens[0].Identity)
		assert.True(t, tokens[0].NextRefresh.Before(tokens[0].ExpiresOn))
	}
	odd := of("odd")
	assert.Equal(t, proxy.IdentityUnknownToIMDS, odd.Reason)
	assert.Contains(t, odd.Fix, "az vmss identity assign")
	assert.Empty(t, odd.Answer, "the agent itself would serve it")
	assert.Contains(t, log.String(), "reason="+odd.Reason)
	assert.Equal(t, podresolver.SelectorCaseDiffers, of("shouting").Reason)
	assert.Empty(t, of("shouting").Refusals, "it has not asked")

	// No token is in any form of it.
	var text strings.Builder
	Printer{terminal.Printer{Out: &text}}.Snapshot(&s)
	handler := Handler(func() Snapshot { return s }, http.NotFoundHandler())
	for _, shown := range []string{get(handler, Page).Body.String(), get(handler, Page+"?format=json").Body.String(), text.String()} {
		assert.Contains(t, shown, "odd")
		assert.NotContains(t, shown, secret)
	}
}

// What was refused to an address's last pod was not refused to the next one.
func TestRefusalsOfAnEarlierPod(t *testing.T) {
	early, late := resolvertest.Pod("early", "10.244.0.1", "nothing"), resolvertest.Pod("late", "10.244.0.1", "nothing")
	p, cluster, _ := parts(t, early)
	require.Empty(t, p.ask(t, "10.244.0.1", "r"))
	pod, err := p.Pod("shop", "early", podresolver.Selector{})
	require.NoError(t, err)
	assert.Len(t, pod.Refusals, 1)
	cluster.Delete(early)
	cluster.Add(late)
	require.Eventually(t, func() bool {
		owner := p.Pods.Owner(netip.MustParseAddr("10.244.0.1"))
		return owner != nil && owner.Name == "late"
	}, 30*time.Second, time.Millisecond)
	pod, err = p.Pod("shop", "late", podresolver.Selector{})
	require.NoError(t, err)
	assert.Empty(t, pod.Refusals)
	_, err = p.Pod("shop", "early", podresolver.Selector{})
	require.ErrorIs(t, err, podresolver.ErrUnknownPod)
}

// A refusal for a reason that is gone no longer counts, and one for a reason that only a request
// shows does.
func TestRefusalsForAReasonThatIsGone(t *testing.T) {
	p, cluster, _ := parts(t, resolvertest.Pod("p", "10.244.0.1", "late"))
	of := func() Pod {
		pod, err := p.Pod("shop", "p", podresolver.Selector{})
		require.NoError(t, err)
		return pod
	}
	require.Empty(t, p.ask(t, "10.244.0.1", "r"))
	assert.Equal(t, []any{Failed, podresolver.NoIdentityBound}, []any{of().State, of().Reason})
	cluster.Add(resolvertest.Binding("late", "late", "cart"))
	require.Eventually(t, func() bool { return of().Answer == "" }, 30*time.Second, time.Millisecond)
	pod := of()
	assert.Equal(t, []any{OK, "", ""}, []any{pod.State, pod.Reason, pod.Fix}, "it need not have asked again")
	assert.Len(t, pod.Refusals, 1)

	require.Empty(t, p.ask(t, "10.244.0.1", "r&client_id=dead0000-0000-4000-8000-000000000004"))
	pod = of()
	assert.Equal(t, []any{Failed, podresolver.RequestedIdentityMissing}, []any{pod.State, pod.Reason})
	assert.Contains(t, pod.Fix, "request an identity that the pod has")
}

// Where the redirect is missing no pod is served, whatever its bindings; where a fence is, all are.
func TestPodsWithoutTheRules(t *testing.T) {
	p, _, _ := parts(t, resolvertest.Pod("cart", "10.244.0.1", "cart"), resolvertest.Pod("quiet", "10.244.0.2", ""))
	rules := iptables.Status{Mode: iptables.DNAT, Err: errors.New("the redirect is not in place: no\nand more"), InPlace: map[string]bool{"routing": true, "redirect": false, "guard": true}}
	p.Rules = func() iptables.Status { return rules }
	of := func(name string) (Pod, string) {
		pod, err := p.Pod("shop", name, podresolver.Selector{})
		require.NoError(t, err)
		var out strings.Builder
		Printer{terminal.Printer{Out: &out}}.Pod(&pod, time.Now())
		return pod, out.String()
	}
	pod, text := of("cart")
	assert.Equal(t, []any{Failed, iptables.RulesMissing, iptables.Fix(iptables.RulesMissing)}, []any{pod.State, pod.Reason, pod.Fix})
	assert.Contains(t, text, "× requests    RulesMissing: the redirect is not in place: no\n              and more\n")
	assert.Contains(t, text, "is answered nothing: its requests do not reach the agent\nwould get AzureIdentity shop/cart")
	assert.NotContains(t, text, "are redirected")
	quiet, _ := of("quiet")
	assert.Equal(t, None, quiet.State)
	s := p.Snapshot()
	assert.Equal(t, []any{iptables.RulesMissing, iptables.Fix(iptables.RulesMissing)}, []any{s.Rules.Problem, s.Rules.Fix})

	rules.Err, rules.InPlace = errors.New("the guard is not in place"), map[string]bool{"routing": true, "redirect": true, "guard": false}
	pod, text = of("cart")
	assert.Equal(t, []any{OK, ""}, []any{pod.State, pod.Answer})
	assert.Contains(t, text, "‼ requests    it is on the pod network, where requests to IMDS are redirected to the agent\n              FenceMissing: the guard is not in place\n")
	assert.Contains(t, text, "\nfix: "+iptables.Fix(iptables.FenceMissing)+"\n")

	rules.Err, rules.InPlace = errors.New("not yet"), nil
	pod, _ = of("cart")
	assert.Equal(t, []any{OK, ""}, []any{pod.State, pod.Answer}, "before the first check nothing is known")

	rules.Mode, rules.Err, rules.InPlace = iptables.None, errors.New("no guard"), map[string]bool{"guard": false}
	pod, _ = of("cart")
	assert.Equal(t, OK, pod.State, "another program redirects")
}

// TestFromObjectsAlone: without an agent, a pod is explained by objects alone.
func TestFromObjectsAlone(t *testing.T) {
	p, _, _ := parts(t, resolvertest.Pod("cart", "10.244.0.1", "cart"))
	pod, err := Parts{Pods: p.Pods}.Pod("shop", "cart", podresolver.Selector{ClientID: cart.ClientID})
	require.NoError(t, err)
	var out strings.Builder
	Printer{terminal.Printer{Out: &out}}.Pod(&pod, time.Now())
	assert.Equal(t, `pod shop/cart, 10.244.0.1
requests client ID "`+cart.ClientID+`"

√ requests    it is on the pod network, where requests to IMDS are redirected to the agent
√ address     10.244.0.1 is its own
√ exception   none applies
√ binding     AzureIdentityBinding "cart" has the selector "cart" and gives it AzureIdentity "cart"
√ identity    AzureIdentity shop/cart has the requested client ID "`+cart.ClientID+`"
- tokens      none in memory; where an identity is not assigned to the node's virtual machine (scale set), IMDS refuses the token

gets AzureIdentity shop/cart (user-assigned managed identity, client ID `+cart.ClientID+`)
`, out.String())
}

func TestHuman(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 s", -time.Hour: "0 s", 400 * time.Millisecond: "0 s", 59 * time.Second: "59 s", 60 * time.Second: "1 min", 3599500 * time.Millisecond: "1 h",
		90 * time.Second: "1 min 30 s", 3 * time.Hour: "3 h", 3*time.Hour + 59*time.Second: "3 h", 76*time.Hour + 12*time.Minute: "3 d 4 h", 48*time.Hour + 5*time.Minute: "2 d",
	} {
		assert.Equal(t, want, human(d), d)
	}
}

// The tokens that an earlier pod with the address has asked for are not shown as the next one's.
func TestTokensOfAnEarlierPod(t *testing.T) {
	p, cluster, _ := parts(t, resolvertest.Pod("cart", "10.244.0.1", "cart"))
	require.NotEmpty(t, p.ask(t, "10.244.0.1", "https://vault.azure.net"))
	cluster.Delete(resolvertest.Pod("cart", "10.244.0.1", "cart"))
	cluster.Add(resolvertest.In("bank", resolvertest.Pod("ledger", "10.244.0.1", "")))
	require.Eventually(t, func() bool {
		owner := p.Pods.Owner(netip.MustParseAddr("10.244.0.1"))
		return owner != nil && owner.Name == "ledger"
	}, 10*time.Second, time.Millisecond)
	pod, err := p.Pod("bank", "ledger", podresolver.Selector{})
	require.NoError(t, err)
	assert.Zero(t, pod.TokensHeld)
	assert.Empty(t, pod.Tokens)
}

// A pod that has been refused whenever it asked is no less so because it has not asked for a while.
func TestRefusedWheneverItAsked(t *testing.T) {
	p, _, _ := parts(t, resolvertest.Pod("odd", "10.244.0.2", "odd"))
	p.ask(t, "10.244.0.2", "r") // IMDS does not know the identity
	for _, later := range []time.Duration{0, time.Hour} {
		pod, err := p.pod("shop", "odd", podresolver.Selector{}, time.Now().Add(later))
		require.NoError(t, err)
		assert.Equal(t, proxy.IdentityUnknownToIMDS, pod.Reason, later)
	}
}

func TestRedirectByPrograms(t *testing.T) {
	s := Snapshot{Rules: Rules{Mode: "ebpf", Reason: "set by flag", Backend: "nft", Parts: []Part{{"redirect", true}, {"routing", true}, {"egress", true}}}}
	assert.Equal(t, line{"redirect", OK, "ebpf, by programs: set by flag"}, s.redirect())
	assert.Equal(t, line{"fences", OK, "routing and egress in place"}, s.fences())
	s.Rules.Parts[2].InPlace = false
	assert.Equal(t, line{"fences", Warning, "egress not in place; routing holds alone"}, s.fences())
}
