package iptables_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

// foreigners are other programs that keep rules on the node. The names of chains and sets
// are those of kube-proxy and of Calico's Felix.
var foreigners = []struct {
	name  string
	shape testbed.Shape // of pods beside it
	mode  iptables.Mode // that works for them
	write func(*node)   // all its rules, its jump first, whether they are there or not
	rules func(*node) []string
}{
	{"kube-proxy, mode iptables", testbed.Ptp, iptables.Redirect, (*node).kubeProxy, (*node).otherRules},
	{"kube-proxy, mode ipvs", testbed.Bridge, iptables.Redirect, (*node).kubeProxyIPVS, (*node).otherRules},
	{"kube-proxy, mode nftables", testbed.Ptp, iptables.DNAT, (*node).kubeProxyNFT, (*node).nftRules},
	{"Calico", testbed.Routed, iptables.DNAT, (*node).calico, (*node).otherRules},
}

func TestBesideOtherProgramsRules(t *testing.T) {
	for _, backend := range backends {
		for _, other := range foreigners {
			t.Run(string(backend)+", "+other.name, func(t *testing.T) {
				n := newNode(t, backend, other.shape)
				t.Cleanup(n.forgetRules)
				other.write(n)
				require.Equal(t, "imds", n.ask(), "their rules do not stop the pod")
				theirs := other.rules(n)
				require.NotEmpty(t, theirs)
				n.leaks.Store(0)

				stopRules := n.redirect(other.mode)
				n.agent(other.mode)
				require.True(t, n.inPlace())
				stopAsking := n.askAllTheTime()
				other.write(n) // its jump was first for a moment
				n.eventually(n.inPlace, "first again")
				stopAsking()
				assert.Zero(t, n.leaks.Load())
				assert.Empty(t, changed(theirs, other.rules(n)))

				n.iptables("-F", "aad-metadata")
				n.eventually(n.inPlace, "still watching after many changes")
				stopRules()
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(other.mode)))
				assert.Empty(t, changed(theirs, other.rules(n)))
				assert.Equal(t, "imds", n.ask(), "as before")
			})
		}
	}
}
