//go:build e2e

package e2e

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestFederationWithSDKs: Azure's SDKs that ask IMDS get tokens by federation, in either redirect
// mode, by default and by client ID, and are told at once what Entra refuses.
func TestFederationWithSDKs(t *testing.T) {
	s := begin(t)
	f := s.federation()
	f.grant("own-node.yaml", "service-accounts.yaml")
	own := f.agentIn("node1")
	f.awaitRight(func() error { return f.requests(own, "shop", "cart", "cart-0", tokenAudience) })
	for _, mode := range []string{"redirect", "dnat"} {
		a := f.starts(federationFlag, "--federation-as-node", "--redirect-mode="+mode)
		require.NoError(t, a.AwaitReady(t.Context()))
		f.comesToToken(f.cart, vault)
		for _, c := range clients {
			t.Run(mode+"/"+c.String(), func(t *testing.T) {
				for _, j := range []job{{Resource: vault, Times: 1}, {Resource: vault, Times: 1, By: "client", ID: federatedID}} {
					results, err := c.run(f.cart.Pod, j)
					require.NoError(t, err)
					require.Len(t, results, 1)
					assert.Equal(t, federatedID, results[0].Subject, results[0].Error)
				}
			})
		}
		if mode == "dnat" {
			f.entra.SetFederated(federatedID)
			for i, c := range clients[:5] { // the default credential tries others first
				results, err := c.run(f.cart.Pod, job{Resource: resource(i%3 + 1), Times: 1})
				require.NoError(t, err)
				require.Len(t, results, 1)
				assert.Contains(t, results[0].Error, "AADSTS70021", c)
				assert.Less(t, results[0].took(), patience, c)
			}
		}
		s.stops(a)
	}
}
