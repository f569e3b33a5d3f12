//go:build e2e

package e2e

import (
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func binding(name string) map[string]string { return map[string]string{"aadpodidbinding": name} }

// Each kind of pod gets what is its own, by whatever address.
func TestEBPF(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	k.agent()
	n, m := s.network("10.244.0.11", testbed.Ptp), s.network("10.244.0.12", testbed.Routed)

	mine := k.pod("cart-0", "10.244.0.11", n, binding("cart"))
	got := mine.asks()
	require.Equal(t, 200, got.status, got.body)
	assert.Equal(t, cart.ClientID, got.subject)

	assert.Equal(t, report.ClientID, k.pod("early-0", "", m, binding("report")).asks().subject, "the API server does not know its address")
	assert.Equal(t, report.ClientID, k.pod("reuse-0", "10.244.0.99", n, binding("report")).asks().subject, "its packets come from another pod's address")
	assert.Equal(t, cart.ClientID, mine.asks().subject)
	assert.Equal(t, 400, k.pod("unbound-0", "10.244.0.13", m, nil).asks().status)
	assert.Equal(t, 503, k.container("00000000-0000-4000-8000-000000000000", m).asks().status, "no pod of the API server's")

	hash := "0123456789abcdef0123456789abcdef"
	k.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: "static-node1", Labels: binding("cart"), Annotations: map[string]string{corev1.MirrorPodAnnotationKey: hash, "kubernetes.io/config.hash": hash},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: testbed.NodeName, UID: "node"}},
	}})
	assert.Equal(t, cart.ClientID, k.container(hash, m).asks().subject, "static pod")

	// Only pods, and only where the programs lead them.
	_, err := net.DialTimeout("tcp", testbed.NodeAddress+":2579", time.Second)
	assert.ErrorContains(t, err, "timeout")
	conn, err := net.Dial("tcp", iptables.DefaultAddress.String()+":2579")
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		_ = conn.Close()
	}
	assert.ErrorContains(t, err, "reset")
	_, text := page(&http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}, "127.0.0.1", metricsPort, "/metrics")
	assert.Contains(t, text, `nmi_connections_unidentified_total{reason="not_redirected"} 1`)
}

func TestEBPFHostNetwork(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	bound, unbound := k.pod("host-bound", "", nil, binding("cart")), k.pod("host-unbound", "", nil, nil)
	gone := k.pod("host-gone", "", nil, binding("report"))
	require.Eventually(t, func() bool { return bound.asks().subject == cart.ClientID }, patience, 50*time.Millisecond)
	require.Eventually(t, func() bool { return gone.asks().subject == report.ClientID }, patience, 50*time.Millisecond)
	before := world.IMDS.Requests()
	assert.NotZero(t, unbound.asks().status)
	assert.Equal(t, before+1, world.IMDS.Requests(), "it asks IMDS itself")
	require.NoError(t, world.DeletePod(t.Context(), "shop", "host-gone"))
	require.Eventually(t, func() bool { return gone.asks().status == http.StatusServiceUnavailable }, patience, 50*time.Millisecond,
		"its processes run on: they do not get the node's identity")
	assert.Equal(t, before+1, world.IMDS.Requests())
	require.NoError(t, a.Kill())
	assert.Zero(t, bound.asks().status)
	assert.Zero(t, gone.asks().status)
	assert.NotZero(t, unbound.asks().status, "the node's programs do without the agent")

	k.agent("--host-network-pods=bound")
	before = world.IMDS.Requests()
	require.Equal(t, 400, unbound.asks().status)
	assert.Equal(t, before, world.IMDS.Requests())
	assert.Equal(t, cart.ClientID, bound.asks().subject)
}

// An excepted pod gets what IMDS says, by way of the agent.
func TestEBPFExcepted(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	k.agent()
	n := s.network("10.244.0.14", testbed.Routed)
	s.object("kube-system", "addon", "10.244.0.14", map[string]string{"kubernetes.azure.com/managedby": "aks"})
	addon := k.containerOf("kube-system", "addon", n)
	got := addon.get(tokenURL + vault + "&client_id=" + report.ClientID)
	assert.Equal(t, report.ClientID, got.subject, got.body)
	assert.Equal(t, imdstest.Node, addon.asks().subject)
	assert.Equal(t, 400, k.pod("plain-0", "10.244.0.15", n, nil).asks().status, "of the same address, and not excepted")
}

// What is sent to a pod on a bridge can be read by its neighbours, although the kernel names the caller.
func TestEBPFBridge(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	mine := k.pod("cart-0", "10.244.0.16", s.network("10.244.0.16", testbed.Bridge), binding("cart"))
	a := k.starts()
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == http.StatusServiceUnavailable && strings.Contains(text, "no tokens are handed out")
	}, patience, 10*time.Millisecond)
	got := mine.asks()
	assert.Equal(t, 400, got.status, got.body)
	assert.Empty(t, got.subject)
	assert.Zero(t, world.IMDS.Requests())
	s.stops(a)
	k.agent("--allow-network-plugin-kubenet")
	assert.Equal(t, cart.ClientID, mine.asks().subject)
}

// A pod gets the identity of its service account, by federation.
func TestEBPFServiceAccount(t *testing.T) {
	s := begin(t)
	f := s.federation()
	f.grant("cluster.yaml", "service-accounts.yaml")
	k := s.kubepods()
	k.agent(federationFlag, "--operation-mode=managed", "--entra-authority="+f.authority, "--federation-authority="+f.authority, "--federation-tenant-id="+principalTenant)
	f.serviceAccount("plain", nil)
	f.podOf("shop", "plain", "plain-0", testbed.NodeName, "", "")
	mine, plain := k.containerOf("shop", "cart-0", f.cart), k.containerOf("shop", "plain-0", f.cart)
	var got answer
	require.Eventually(t, func() bool { got = mine.asks(); return got.subject == federatedID }, patience, 100*time.Millisecond, "%+v", &got)
	assert.Equal(t, 400, plain.asks().status, "another service account, by the same address")
}

// Pods that start while no agent runs are refused, and served by the next one. One on the host network
// is redirected from when the agent sees its cgroup.
func TestEBPFPodsMadeMeanwhile(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	require.NoError(t, a.Kill())
	p := k.pod("cart-0", "10.244.0.17", s.network("10.244.0.17", testbed.Routed), binding("cart"))
	host := k.pod("host-0", "", nil, binding("report"))
	assert.Zero(t, p.asks().status)
	assert.NotEqual(t, report.ClientID, host.asks().subject, "it gets what IMDS gives the node")
	a = k.agent()
	assert.Equal(t, cart.ClientID, p.asks().subject)
	require.Eventually(t, func() bool { return host.asks().subject == report.ClientID }, patience, 50*time.Millisecond)

	// The object is there before the cgroup, of which nothing tells the agent.
	k.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "host-1", Labels: binding("cart")}, Spec: corev1.PodSpec{HostNetwork: true}})
	s.says(a, "pod=shop/host-1")
	late := k.containerOf("shop", "host-1", nil)
	require.Eventually(t, func() bool { return late.asks().subject == cart.ClientID }, patience, 50*time.Millisecond)
}
