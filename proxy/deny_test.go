package proxy

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
)

// withheld is a world in which no pod may have these identities.
func withheld(t *testing.T, ids ...string) *world {
	t.Helper()
	deny, err := podresolver.ParseDenyList(ids)
	require.NoError(t, err)
	return newWorld(t, func(c *Config) {
		withHost(c)
		c.Pods = runResolver(t, podresolver.Config{Deny: deny, Logger: slog.New(slog.DiscardHandler)})
	})
}

// The AzureIdentity "two" gives a resource ID alone: only IMDS's answer says that its
// client ID is denied.
func TestDeniedClientIDOfAResourceID(t *testing.T) {
	w := withheld(t, two.ClientID)
	for range 2 { // from IMDS, then from memory
		for _, query := range []string{"", "&bypass_cache=true", "&token_sha256_to_refresh=" + "00"} {
			resp, body := w.get(bound, tokenURL+"&mi_res_id="+two.ResourceID+query)
			assert.Equal(t, 400, resp.StatusCode, query)
			assert.JSONEq(t, noID, body)
		}
		resp, body := w.send(ownHost, hostRequest("bound", "&mi_res_id="+two.ResourceID))
		assert.Equal(t, 400, resp.StatusCode, "nor to a program of the node that acts for the pod")
		assert.JSONEq(t, noID, body)
	}
	assert.Contains(t, w.log.String(), "the token is for client ID "+two.ClientID+", denied by --deny-identity")

	resp, body := w.get(bound, tokenURL)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, one.ClientID, tokenSubject(body), "its other identity")
}

func TestDeniedIdentityDoesNotReachIMDS(t *testing.T) {
	w := withheld(t, one.ClientID, two.ResourceID)
	for _, query := range []string{"", "&client_id=" + one.ClientID, "&mi_res_id=" + one.ResourceID, "&mi_res_id=" + two.ResourceID} {
		resp, body := w.get(bound, tokenURL+query)
		assert.Equal(t, 400, resp.StatusCode, query)
		assert.JSONEq(t, noID, body)
	}
	assert.Zero(t, w.imds.Requests())
	assert.Contains(t, w.log.String(), "has client ID "+one.ClientID+", denied by --deny-identity")
}
