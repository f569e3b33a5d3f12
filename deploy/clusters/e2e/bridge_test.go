//go:build cluster

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestBridgeWithoutPinnedAddresses(t *testing.T) {
	s := begin(t, "Where pods share a bridge, they get tokens with nmi.allowNetworkPluginKubenet alone.", theIMDS)
	if !onBridge() {
		s.skip("pods of this cluster share no bridge (CNI=bridge)")
	}
	s.bind("cart", cart)
	s.start(pod{name: "allowed", binding: "cart", askers: []asker{{requests: []request{s.token(cart)}, n: forever, every: time.Hour}}})
	s.eventually("the answer for pod allowed", func() bool { return s.hasWritten(s.namespace, "allowed") })

	// The new agent takes over, and is not ready while there are pods on the bridge.
	s.restoreAgent()
	require.NoError(t, world.apply(t.Context(), "nmi.allowNetworkPluginKubenet=false"))
	s.eventually("the new agent to take over, and to say why it is not ready", func() bool {
		log, err := world.command(t.Context(), "kubectl", "-n", agentNamespace, "logs", s.freshAgent().Name)
		return err == nil && strings.Contains(log, "took over from the agent that ran before") && strings.Contains(log, "tokens=withheld")
	})
	s.start(pod{name: "withheld", binding: "cart", askers: []asker{asks(s.refused(), s.refused("client_id="+cart.ClientID))}})
	s.finish()
}
