//go:build e2e

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The status page is for the node, and so is nmi status, which says the same.
func TestStatus(t *testing.T) {
	s := begin(t)
	a := s.agent("--http-probe-address=127.0.0.1", "--pod-wait=100ms")
	served, shouting := s.pod("served-0", "10.244.0.91", testbed.Ptp, "cart"), s.pod("shouting-0", "10.244.0.92", testbed.Ptp, "CART")
	served.hears(vault, cart.ClientID)
	assert.Equal(t, 400, shouting.asks(vault).status)

	socket := "--probe-socket=" + a.ProbeSocket
	code, output := s.nmi("status", socket)
	assert.Zero(t, code, output)
	for _, text := range []string{
		"on node node1 is ready", ", by iptables-", "√ fences       guard and routing in place", "√ API server", "√ IMDS",
		"served-0", "AzureIdentity shop/cart", "× shop/shouting-0: SelectorCaseDiffers", `fix: set the pod's label aadpodidbinding (in its controller's template) to "cart"`,
	} {
		assert.Contains(t, output, text)
	}
	code, output = s.nmi("explain", socket, "--client-id="+third.ClientID, "-o", "json", "shop/served-0")
	assert.Zero(t, code, output)
	var pod struct {
		Reason, Fix, Answer string
		Tokens              []struct{ Resource string }
	}
	require.NoError(t, json.Unmarshal([]byte(output), &pod), output)
	assert.Equal(t, "RequestedIdentityMissing", pod.Reason)
	assert.Contains(t, pod.Answer, "400 invalid_request")
	if assert.Len(t, pod.Tokens, 1) {
		assert.Equal(t, vault, pod.Tokens[0].Resource)
	}

	client := &http.Client{Timeout: patience}
	defer client.CloseIdleConnections()
	status, html := page(client, "127.0.0.1", probePort, "/statusz")
	assert.Equal(t, 200, status)
	assert.Contains(t, html, "SelectorCaseDiffers")
	_, text := page(client, "127.0.0.1", probePort, "/statusz?format=json")
	assert.True(t, json.Valid([]byte(text)))
	token := strings.Split(served.asks(vault).body, `"`)[3]
	require.Greater(t, len(token), 20)
	assert.NotContains(t, html+text, token)
	status, _ = page(served.Client(2*time.Second), testbed.NodeAddress, probePort, "/statusz")
	assert.Zero(t, status, "a pod reads nothing")

	got := served.get("http://"+testbed.MetadataAddress+"/metadata/nmi", patience)
	assert.Equal(t, 200, got.status)
	assert.Contains(t, got.body, `"agent":"nmi"`)
	assert.Contains(t, got.body, `"pod_known":true`)
}

// On a port that pods can reach there is no status.
func TestNoStatusForPods(t *testing.T) {
	s := begin(t)
	s.agent()
	p := s.pod("curious-0", "10.244.0.93", testbed.Ptp, "cart")
	p.hears(vault, cart.ClientID)
	client := &http.Client{Timeout: patience}
	defer client.CloseIdleConnections()
	for _, port := range []int{probePort, metricsPort} {
		status, body := page(p.Client(patience), testbed.NodeAddress, port, "/statusz")
		assert.Equal(t, 404, status, body)
		status, body = page(client, "127.0.0.1", port, "/statusz")
		assert.Equal(t, 404, status, "not even from the node: %s", body)
	}
}
