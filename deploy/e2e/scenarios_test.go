//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// wirings are the ways to connect a pod to the agent that work.
var wirings = []struct {
	name  string
	shape testbed.Shape
	mode  string
}{
	{"an interface with an address, redirect", testbed.Ptp, "redirect"},
	{"an interface with an address, dnat", testbed.Ptp, "dnat"},
	{"an interface without, dnat", testbed.Routed, "dnat"},
	{"an interface with an address, auto", testbed.Ptp, "auto"},
	{"an interface without, auto", testbed.Routed, "auto"},
}

func TestABoundPodGetsItsTokenFromUpstreamOnceThenFromMemory(t *testing.T) {
	for _, wiring := range wirings {
		t.Run(wiring.name, func(t *testing.T) {
			s := begin(t)
			p := s.pod("cart-0", "10.244.0.11", wiring.shape, "cart")
			s.agent("--redirect-mode=" + wiring.mode)

			first := p.asks(vault)
			require.Equal(t, 200, first.status, first.body)
			assert.Equal(t, cart.ClientID, first.subject)
			assert.Equal(t, 1, world.IMDS.Requests())

			second := p.asks(vault)
			assert.Equal(t, first.subject, second.subject)
			assert.Equal(t, 1, world.IMDS.Requests(), "no upstream call for the second")
		})
	}
}

func TestRedirectWithoutAnAddressDropsAndDoesNotLeak(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Routed, "cart")
	s.agent("--redirect-mode=redirect")
	assert.Zero(t, p.probes().status, "the kernel has no address to redirect to")
	assert.Zero(t, world.IMDS.Requests())
}

func TestTwoPodsGetTheirOwnIdentitiesAndMayNotNameTheOthers(t *testing.T) {
	s := begin(t)
	a := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	b := s.pod("report-0", "10.244.0.12", testbed.Ptp, "report")
	s.agent()
	assert.Equal(t, cart.ClientID, a.asks(vault).subject)
	assert.Equal(t, report.ClientID, b.asks(vault).subject)
	assert.Equal(t, cart.ClientID, a.asks(vault+"&msi_res_id="+cart.ResourceID).subject)

	others := a.asks(vault + "&client_id=" + report.ClientID)
	assert.Equal(t, 400, others.status)
	assert.Empty(t, others.subject, "in memory it is, but not for this pod")
}

func TestFiveHundredColdRequestsMakeOneUpstreamCall(t *testing.T) {
	s := begin(t)
	s.agent()
	var clients []*http.Client
	for i := range 10 { // of at most 64 connections each
		p := s.pod(fmt.Sprintf("cart-%d", i), fmt.Sprintf("10.244.0.%d", 20+i), testbed.Ptp, "cart")
		clients = append(clients, p.Client(patience))
		defer clients[i].CloseIdleConnections()
	}
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() { assert.Equal(t, cart.ClientID, ask(t, clients[i%len(clients)], tokenURL+vault).subject) })
	}
	wg.Wait()
	assert.Equal(t, 1, world.IMDS.Requests())
}

func TestAnExceptedPodGetsWhatIMDSGivesTheNode(t *testing.T) {
	s := begin(t)
	p := s.network("10.244.0.13", testbed.Ptp)
	// The exception is the one in deploy/manifests.
	s.object("kube-system", "addon-0", "10.244.0.13", map[string]string{"kubernetes.azure.com/managedby": "aks"})
	s.agent()
	assert.Equal(t, imdstest.Node, p.asks(vault).subject)
	attested := p.get("http://"+testbed.MetadataAddress+"/metadata/attested/document?api-version=2021-02-01", patience)
	assert.Equal(t, 200, attested.status, "passed through, whatever it is")
}

func TestAPodWithoutBindingIsRefusedAndIMDSNotAsked(t *testing.T) {
	s := begin(t)
	p := s.pod("nobody", "10.244.0.14", testbed.Ptp, "nothing")
	s.agent()
	got := p.asks(vault)
	assert.Equal(t, 400, got.status)
	assert.Equal(t, `{"error":"invalid_request","error_description":"Identity not found"}`, got.body)
	assert.Equal(t, 404, p.get("http://"+testbed.MetadataAddress+`/metadata\identity\oauth2\token?api-version=2018-02-01&resource=x`, patience).status)
	assert.Equal(t, 404, p.get("http://"+testbed.MetadataAddress+"/metadata/attested/document?api-version=2021-02-01", patience).status)
	assert.Zero(t, world.IMDS.Requests())
	assert.Equal(t, 200, p.get("http://"+testbed.MetadataAddress+"/metadata/instance?api-version=2021-02-01", patience).status)
}

func TestABindingThatGoesTakesItsTokensWithIt(t *testing.T) {
	s := begin(t)
	require.NoError(t, world.Bind(t.Context(), "shop", "brief", cart))
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "brief")
	s.agent()
	p.hears(vault, cart.ClientID) // what the API server lists may be a moment old
	require.NoError(t, world.Unbind(t.Context(), "shop", "brief"))
	require.Eventually(t, func() bool { return p.asks(vault).status == 400 }, patience, 10*time.Millisecond,
		"refused, although the token is in memory")
}

func TestAnAddressUsedAgainNeverHandsOverTheOldIdentity(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	s.agent()
	require.Equal(t, cart.ClientID, p.asks(vault).subject)

	// From here on the address is nobody's, or the other pod's.
	require.NoError(t, world.DeletePod(t.Context(), "shop", "cart-0"))
	require.Eventually(t, func() bool { return p.asks(vault).status == 503 }, patience, time.Millisecond)
	s.object("shop", "nobody", "10.244.0.11", map[string]string{"aadpodidbinding": "nothing"})
	require.Eventually(t, func() bool {
		got := p.asks(vault)
		require.Empty(t, got.subject, "the identity of the pod before")
		return got.status == 400
	}, patience, time.Millisecond)
	require.NoError(t, world.DeletePod(t.Context(), "shop", "nobody"))
	s.object("shop", "report-0", "10.244.0.11", map[string]string{"aadpodidbinding": "report"})
	require.Eventually(t, func() bool {
		got := p.asks(vault)
		require.NotEqual(t, cart.ClientID, got.subject)
		return got.subject == report.ClientID
	}, patience, time.Millisecond)
}

func TestAPodThatAsksBeforeItsAddressIsKnownGetsItsToken(t *testing.T) {
	s := begin(t)
	p := s.network("10.244.0.15", testbed.Ptp)
	s.object("shop", "early", "", map[string]string{"aadpodidbinding": "cart"})
	nobodys := s.network("10.244.0.16", testbed.Ptp)
	s.agent("--pod-wait=10s")
	heard, strangerHeard := make(chan answer, 1), make(chan answer, 1)
	go func() { heard <- p.asks(vault) }()
	go func() { strangerHeard <- nobodys.asks(vault) }()
	select {
	case got := <-heard:
		t.Fatalf("answered before the pod is known: %+v", got)
	case <-time.After(300 * time.Millisecond): // the request waits at the agent
	}
	require.NoError(t, world.SetPodAddress(t.Context(), "shop", "early", "10.244.0.15"))
	assert.Equal(t, cart.ClientID, (<-heard).subject)

	stranger := <-strangerHeard
	assert.Equal(t, 503, stranger.status)
	assert.Equal(t, "1", stranger.retryAfter)
}

func TestStoppedWithSIGTERMPodsAreRefusedAndNothingLeaks(t *testing.T) {
	for _, wiring := range wirings {
		t.Run(wiring.name, func(t *testing.T) {
			s := begin(t)
			p := s.pod("cart-0", "10.244.0.11", wiring.shape, "cart")
			a := s.agent("--redirect-mode=" + wiring.mode)
			require.Equal(t, 200, p.asks(vault).status)
			code, err := a.Stop()
			require.NoError(t, err)
			assert.Zero(t, code)
			assert.Zero(t, p.probes().status)
			assert.Equal(t, 1, world.IMDS.Requests())
		})
	}
}

func TestKilledAndStartedAgainItWorksAndNothingLeakedMeanwhile(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	asking.Go(func() { // a pod that never stops asking
		for ctx.Err() == nil {
			if got := p.probes(); got.status != 0 {
				assert.Equal(t, cart.ClientID, got.subject, got.body)
			}
		}
	})
	for range 3 {
		require.NoError(t, a.Kill())
		a = s.agent()
		require.Equal(t, cart.ClientID, p.asks(vault).subject)
	}
	stop()
	asking.Wait()
}

func TestKilledAHundredTimesWhileItWritesRulesNothingLeaks(t *testing.T) {
	s := begin(t)
	// An address of its own: thousands of its connections are led to a port that
	// nobody has afterwards, and the kernel remembers them for two minutes.
	p := s.pod("cart-0", "10.244.0.61", testbed.Ptp, "cart")
	s.agent() // from here on there are rules
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range 4 {
		asking.Go(func() {
			for ctx.Err() == nil {
				if got := p.probes(); got.subject != "" {
					assert.Equal(t, cart.ClientID, got.subject)
				}
			}
		})
	}
	// Each start finds the rules of the other mode and has to write its own, some
	// 100 ms after it began; how many depends on the machine, and on what else it does.
	// So the next has less time if the last came to it, and more if not. Its ports are
	// its own, so that the first agent lives on.
	random := rand.New(rand.NewPCG(1, 2))
	most := 200 * time.Millisecond
	wrote := 0
	for i := range 100 {
		mode := []string{"dnat", "redirect"}[i%2]
		a, err := testbed.StartAgent(world.Kubeconfig, "--handover-dir=", "--redirect-mode="+mode,
			"--nmi-port=2580", "--http-probe-port=8086", "--prometheus-port=9091")
		require.NoError(t, err)
		time.Sleep(time.Duration(random.Int64N(int64(most))))
		require.NoError(t, a.Kill())
		if strings.Contains(a.Log(), "iptables rules put in place") {
			wrote++
			most = max(most*9/10, 20*time.Millisecond)
		} else {
			most = most * 10 / 9
		}
	}
	stop()
	asking.Wait()
	assert.True(t, 20 < wrote && wrote < 95, "agents that were killed after they had written their rules: %d; the others were killed before", wrote)
	t.Logf("killed after they had written their rules: %d of 100", wrote)
	require.Eventually(t, func() bool { return p.asks(vault).subject == cart.ClientID }, patience, 50*time.Millisecond, "repaired")
}

func TestWithTheAPIServerAwayKnownPodsStillGetTokens(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	require.NoError(t, world.StopAPIServer())
	assert.Equal(t, cart.ClientID, p.asks(vault).subject, "from memory")
	assert.Equal(t, cart.ClientID, p.asks("https://management.azure.com").subject, "from upstream")
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		require.Equal(t, http.StatusOK, status, text)
		return strings.Contains(text, "decisions may be out of date:\n- pods: cannot reach the API server")
	}, patience, 10*time.Millisecond, "ready all the same, and says so")
	require.NoError(t, world.StartAPIServer(t.Context()))
	// The informers come back: a new pod is seen.
	late := s.pod("late", "10.244.0.17", testbed.Ptp, "report")
	require.Eventually(t, func() bool { return late.asks(vault).subject == report.ClientID }, time.Minute, 50*time.Millisecond)
	require.Eventually(t, func() bool {
		_, text := a.Ready(t.Context())
		return !strings.Contains(text, "out of date")
	}, time.Minute, 50*time.Millisecond)
}

func TestTheAgentCannotBeReachedByTheNodesAddress(t *testing.T) {
	for _, mode := range []string{"redirect", "dnat"} {
		t.Run(mode, func(t *testing.T) {
			s := begin(t)
			p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
			s.agent("--redirect-mode=" + mode)
			for _, host := range []string{testbed.NodeAddress, "10.244.0.1", "169.254.169.252"} {
				url := "http://" + host + ":2579/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + vault
				assert.Zero(t, p.get(url, time.Second).status, "from a pod to %s", host)
				outside := &http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: world.Metadata.DialContext, DisableKeepAlives: true}}
				assert.Zero(t, ask(t, outside, url).status, "from the network to %s", host)
			}
			assert.Equal(t, 200, p.asks(vault).status, "redirected, all is well")
		})
	}
}

func TestOnAnOpenBridgeNoTokenIsHandedOutUnlessAllowed(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Bridge, "cart")
	excepted := s.network("10.244.0.12", testbed.Bridge)
	s.object("kube-system", "addon", "10.244.0.12", map[string]string{"kubernetes.azure.com/managedby": "aks"})
	a := s.agentNotReady()
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == http.StatusServiceUnavailable && strings.Contains(text, "no tokens are handed out") && strings.Contains(text, "cbr0")
	}, patience, 10*time.Millisecond, "not ready, and says why")
	for _, asking := range []*pod{p, excepted} {
		got := asking.asks(vault)
		assert.Equal(t, 400, got.status, "SDKs stop at once")
		assert.Contains(t, got.body, "This node's network does not show which pod is calling")
		assert.Empty(t, got.subject)
	}
	assert.Zero(t, world.IMDS.Requests(), "redirected all the same")
	s.says(a, "pods on this link can take each other's addresses: cbr0, address 10.244.0.11")
	_, err := a.Stop()
	require.NoError(t, err)

	a = s.agent("--allow-network-plugin-kubenet")
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
	s.says(a, "level=WARN") // it was allowed, and is no less wrong
}

func TestInModeNoneSomebodyElseRedirectsAndOnlyThisNodesPodsAreServed(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	// As Cilium's local redirect policy: to the pod, the agent is at the node's
	// address from the first packet on.
	agentURL := strings.Replace(tokenURL, testbed.MetadataAddress, testbed.NodeAddress+":2579", 1) + vault
	a := s.agent("--redirect-mode=none")
	assert.NotContains(t, s.nat(), "aad-metadata")
	assert.Equal(t, cart.ClientID, p.get(agentURL, patience).subject)
	_, text := a.Ready(t.Context())
	assert.Contains(t, text, "redirect mode none")

	instance := "http://" + testbed.NodeAddress + ":2579/metadata/instance?api-version=2021-02-01"
	assert.Equal(t, 200, p.get(instance, patience).status)
	asked := world.IMDS.Requests()
	outside := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: world.Metadata.DialContext, DisableKeepAlives: true}}
	for _, url := range []string{agentURL, instance} {
		got := ask(t, outside, url)
		assert.Equal(t, 503, got.status, "from the network: no pod of this node")
		assert.Empty(t, got.subject)
	}
	assert.Equal(t, asked, world.IMDS.Requests())
	s.stops(a)
	assert.Contains(t, a.Log(), "nobody redirects to this agent any more, and only its fences keep pods from the metadata service")
	assert.Zero(t, p.probes().status, "where the other redirect is missing, a fence refuses")
}

func TestMetrics(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	s.agent("--redirect-mode=redirect")
	for range 4 {
		require.Equal(t, http.StatusOK, p.asks(vault).status)
	}
	resp, err := http.Get("http://127.0.0.1:9090/metrics")
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	const tokens = `http_server_request_duration_seconds_count{http_request_method="GET",http_response_status_code="200",http_route="/metadata/identity/oauth2/token",nmi_source=`
	for _, line := range []string{
		tokens + `"upstream"} 1`, tokens + `"memory"} [1-3]`, `nmi_upstream_request_duration_seconds_count{outcome="ok",source="imds"} 1`,
		`nmi_rules_info{backend="(nft|legacy)",mode="redirect"} 1`, `nmi_rules_in_place{component="redirect"} 1`, `nmi_rules_in_place{component="routing"} 1`,
		"nmi_sources_withheld 0", "nmi_rules_checks_total [1-9]", "nmi_rules_repairs_total 1", `nmi_rules_lost_total{component="redirect"} 0`,
		`nmi_rules_lost_total{component="routing"} 0`, `nmi_rules_errors_total{cause="permission"} 0`, "nmi_rules_lock_waits_total 0",
		"nmi_rules_stale_flows_cut_total [0-9]", "nmi_ready 1", `nmi_pods_resolutions_total{outcome="(found|waited)"} [1-4]`,
	} {
		assert.Regexp(t, "(?m)^"+line, string(body))
	}
	doc, err := os.ReadFile("../../docs/metrics.md")
	require.NoError(t, err)
	for line := range strings.Lines(string(body)) {
		name, ok := strings.CutPrefix(line, "# TYPE ")
		name, _, _ = strings.Cut(name, " ")
		if ok && (strings.HasPrefix(name, "nmi_") || strings.HasPrefix(name, "http_")) {
			assert.Contains(t, string(doc), "`"+name+"`")
		}
	}
}
