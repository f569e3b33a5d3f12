package proxy

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestServicePrincipalToken(t *testing.T) {
	p := newPrincipalWorld(t)
	for from, id := range map[string]string{bySecret: secretID, byFile: fileID} {
		before := p.entra.Tokens()
		status, body := p.asks(from, vault)
		require.Equal(t, 200, status, body)
		assert.Equal(t, id, tokenSubject(body))
		var fields map[string]string // every one a string, or this fails
		require.NoError(t, json.Unmarshal([]byte(body), &fields))
		assert.Len(t, fields, 8)
		assert.Equal(t, id, fields["client_id"])
		assert.Equal(t, vault, fields["resource"])
		_, body = p.asks(from, vault+"&client_id="+strings.ToUpper(id))
		assert.Equal(t, id, tokenSubject(body))
		assert.Equal(t, 1, p.entra.Tokens()-before, "the second came from memory")
	}
}

func TestAuxiliaryTenants(t *testing.T) {
	p := newPrincipalWorld(t)
	status, body := p.asks(ofTenants, vault)
	require.Equal(t, 200, status, body)
	var all []map[string]string
	require.NoError(t, json.Unmarshal([]byte(body), &all))
	require.Len(t, all, 3)
	for i, tenant := range []string{tenantA, tenantB, tenantC} {
		assert.Len(t, all[i], 8)
		assert.Equal(t, secretID, imdstest.Subject(all[i]["access_token"]))
		assert.Equal(t, tenant, entratest.Tenant(all[i]["access_token"]), "the primary first")
	}
	assert.Equal(t, 3, p.entra.Tokens())
	_, again := p.asks(ofTenants, vault)
	require.NoError(t, json.Unmarshal([]byte(again), &all))
	_, one := p.asks(bySecret, vault)
	assert.Equal(t, secretID, tokenSubject(one), "another identity of the same principal: no array")
	assert.Equal(t, 3, p.entra.Tokens(), "and the token that is there already")
}

func TestAuxiliaryTenantFailure(t *testing.T) {
	p := newPrincipalWorld(t)
	p.entra.Inject(entratest.Fault{Status: 200, Body: `{"access_token":"eyA.0","expires_in":3600,"token_type":"Bearer"}`}, // the primary's
		entratest.Fault{Status: 400, Body: `{"error":"unauthorized_client","error_description":"AADSTS700016: not in tenant B"}`})
	status, body := p.asks(ofTenants, vault)
	assert.Equal(t, 400, status)
	assert.JSONEq(t, `{"error":"unauthorized_client","error_description":"AADSTS700016: not in tenant B"}`, body)
	assert.Contains(t, p.log.String(), "auxiliary tenant "+tenantB)
	for _, call := range p.entra.Calls() {
		assert.NotContains(t, call.Path, tenantC, "one after the other")
	}
}

func TestChangedSecret(t *testing.T) {
	p := newPrincipalWorld(t)
	status, _ := p.asks(bySecret, vault)
	require.Equal(t, 200, status)
	p.entra.SetSecret(secretID, "the new one")
	status, body := p.asks(bySecret, management)
	assert.Equal(t, 400, status)
	assert.Contains(t, body, "AADSTS7000215")
	p.setSecret("shop/client-secret", map[string][]byte{"clientsecret": []byte("the new one\n")})
	status, body = p.asks(bySecret, graph) // what was refused before may be remembered
	assert.Equal(t, 200, status, body)
	status, _ = p.asks(bySecret, vault)
	assert.Equal(t, 200, status, "what is in memory is still good")
}

const noCredentialBody = `{"error":"invalid_client","error_description":"The credential of this identity cannot be used; see the log of the node's agent for the reason"}`

func TestUnusableSecretIsExplainedInLog(t *testing.T) {
	_, file := theFile()
	for name, tc := range map[string]struct {
		from string
		data map[string][]byte
		log  string
	}{
		"missing":                {bySecret, nil, "secret shop/client-secret: it cannot be read: there is no such secret"},
		"several keys":           {bySecret, map[string][]byte{"one": []byte(theSecret), "two": []byte(theSecret)}, "secret shop/client-secret: has keys one, two; want clientsecret"},
		"no keys":                {bySecret, map[string][]byte{}, "secret shop/client-secret: has no keys"},
		"wrong key":              {byFile, map[string][]byte{"pfx": file}, "secret shop/file: has keys pfx; want certificate"},
		"wrong password":         {byFile, map[string][]byte{"certificate": file, "password": []byte("wrong")}, "secret shop/file: wrong password in key password for the PKCS12 file in key certificate"},
		"no password":            {byFile, map[string][]byte{"certificate": file}, "secret shop/file: the PKCS12 file in key certificate has a password"},
		"adEndpoint of no one's": {toEvil, map[string][]byte{"clientsecret": []byte(theSecret)}, "https://login.evil.example"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPrincipalWorld(t)
			p.mu.Lock()
			for _, secret := range []string{"shop/client-secret", "shop/file"} {
				delete(p.secrets, secret)
				if tc.data != nil {
					p.secrets[secret] = tc.data
				}
			}
			p.mu.Unlock()
			status, body := p.asks(tc.from, vault)
			assert.Equal(t, 400, status, "SDKs stop at once")
			assert.Equal(t, noCredentialBody, body, "nothing internal is in it")
			assert.Contains(t, p.log.String(), tc.log)
			assert.Empty(t, p.entra.Calls())
			if tc.from == toEvil {
				assert.Contains(t, p.log.String(), "--entra-authority")
				assert.Zero(t, p.reads)
			}
		})
	}
}

func TestTemporaryFailuresOfServicePrincipals(t *testing.T) {
	p := newPrincipalWorld(t)
	p.mu.Lock()
	p.down = errors.New("dial tcp 10.96.0.1:443: connect: connection refused")
	p.mu.Unlock()
	status, body := p.asks(bySecret, vault)
	assert.Equal(t, 503, status)
	assert.Equal(t, `{"error":"temporarily_unavailable","error_description":"The credential of this identity cannot be read now"}`, body)
	assert.Contains(t, p.log.String(), "connection refused")
	p.mu.Lock()
	p.down = nil
	p.mu.Unlock()

	p.entra.Inject(entratest.Fault{Status: 429, RetryAfter: "9", Body: `{"error":"temporarily_unavailable"}`})
	status, _ = p.asks(bySecret, management)
	assert.Equal(t, 429, status)

	down := entratest.Fault{Status: 503}
	p.entra.Inject(down, down, down)
	status, body = p.asks(byFile, vault)
	assert.Equal(t, 503, status)
	assert.Contains(t, body, "Entra is not available")

	p.entra.Inject(entratest.Fault{Status: 200, Body: `{"access_token":"eyJ-half`})
	status, body = p.asks(byFile, management)
	assert.Equal(t, 503, status)
	assert.Contains(t, body, "Entra is not available")
}

func TestAADSTSError(t *testing.T) {
	p := newPrincipalWorld(t)
	status, body := p.asks(bySecret, "https://nothing.example/")
	assert.Equal(t, 400, status)
	var told struct{ Error, Description string }
	require.NoError(t, json.Unmarshal([]byte(strings.Replace(body, "error_description", "Description", 1)), &told))
	assert.Equal(t, "invalid_resource", told.Error)
	assert.True(t, strings.HasPrefix(told.Description, "AADSTS500011: The resource principal named https://nothing.example/ was not found"), told.Description)
	assert.Contains(t, p.log.String(), "AADSTS500011", "operators see it too")
}

// TestInUseWithAuxiliaryTenants: they are refreshed without being asked for as
// long as the pod is there.
func TestInUseWithAuxiliaryTenants(t *testing.T) {
	p := newPrincipalWorld(t)
	inUse := InUse(p.server.cfg.Pods)
	pod, err := p.server.cfg.Pods.Resolve(t.Context(), netip.MustParseAddr(ofTenants))
	require.NoError(t, err)
	id, err := pod.Identity(podresolver.Selector{})
	require.NoError(t, err)
	keys := append(auxiliaryKeys(id, vault), keyOf(id, vault))
	require.Len(t, keys, 3)
	for _, key := range keys {
		assert.True(t, inUse(netip.MustParseAddr(ofTenants), key), key)
	}
	stray := keys[0]
	stray.Principal = principalIn(id, "another tenant")
	assert.False(t, inUse(netip.MustParseAddr(ofTenants), stray))
	assert.False(t, inUse(netip.MustParseAddr(bySecret), keys[0]), "it has no auxiliary tenants")
}
