package proxy

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/upstream"
)

const (
	proxyName    = "oidc.issuer.aks.example"
	bindingToken = "api://AKSIdentityBinding"
)

// newBoundWorld is a federationWorld with AKS identity bindings: Entra's own address, which is the
// real one, is never asked.
func newBoundWorld(t *testing.T, change func(*upstream.TokenProxy)) (*federationWorld, *entratest.TokenProxy) {
	t.Helper()
	var proxy *entratest.TokenProxy
	f := newFederationWorldIn(t, "https://login.microsoftonline.com", func(f *federationWorld, c *upstream.Config) {
		proxy = f.entra.StartTokenProxy(proxyName)
		t.Cleanup(proxy.Close)
		c.Authorities = nil
		c.TokenProxy = upstream.TokenProxy{URL: proxy.URL, ServerName: proxyName, CAData: string(proxy.CA)}
		if change != nil {
			change(&c.TokenProxy)
		}
	})
	f.api(func() { f.audience = bindingToken })
	f.entra.SetFederated(cartID, entratest.FederatedCredential{Issuer: issuerURL, Subject: entratest.Subject("shop", "cart"), Audience: bindingToken})
	return f, proxy
}

func TestTokenProxy(t *testing.T) {
	f, proxy := newBoundWorld(t, nil)
	status, body := f.asks(ofCart, vault)
	require.Equal(t, 200, status, body)
	assert.Equal(t, cartID, tokenSubject(body))
	assert.Contains(t, proxy.Requests(), "POST /"+tenantA+"/oauth2/v2.0/token")
	for _, request := range proxy.Requests() {
		assert.True(t, slices.Contains([]string{"GET /" + tenantA + "/v2.0/.well-known/openid-configuration", "POST /" + tenantA + "/oauth2/v2.0/token"}, request), request)
	}
	status, body = f.asks(ofReport, vault)
	assert.Equal(t, 400, status, body)
	assert.Contains(t, body, "AADSTS", "the words of Entra, or of who stands for it")
}

// TestTokenProxyRefuses: in words of its own, which are the cluster's.
func TestTokenProxyRefuses(t *testing.T) {
	f, proxy := newBoundWorld(t, nil)
	proxy.Forbid(cartID)
	status, body := f.asks(ofCart, vault)
	assert.Equal(t, 400, status, body)
	assert.Contains(t, body, "unauthorized_client")
	assert.Contains(t, body, "the cluster's token proxy refused: cannot use-managed-identity")
	assert.Len(t, proxy.Requests(), 2, "no retry changes it")
}

// TestUntrustedTokenProxy: a token of a service account is sent to no other program that listens there.
func TestUntrustedTokenProxy(t *testing.T) {
	_, stranger := newBoundWorld(t, nil)
	for name, change := range map[string]func(*upstream.TokenProxy){
		"another CA":     func(p *upstream.TokenProxy) { p.CAData = string(stranger.CA) },
		"the system's":   func(p *upstream.TokenProxy) { p.CAData = "" },
		"another name":   func(p *upstream.TokenProxy) { p.ServerName = "other.example" },
		"no name":        func(p *upstream.TokenProxy) { p.ServerName = "" },
		"no certificate": func(p *upstream.TokenProxy) { p.CAData = "PEM" },
		"no file":        func(p *upstream.TokenProxy) { p.CAFile = "/nowhere/ca.crt" },
	} {
		t.Run(name, func(t *testing.T) {
			f, proxy := newBoundWorld(t, change)
			status, body := f.asks(ofCart, vault)
			assert.Equal(t, 503, status)
			assert.Contains(t, body, "Entra is not available")
			assert.Empty(t, proxy.Requests())
		})
	}
}

// TestTokenProxyCAFile: the cluster renews its CA.
func TestTokenProxyCAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.crt")
	_, stranger := newBoundWorld(t, nil)
	write := func(pem []byte) { require.NoError(t, os.WriteFile(file, pem, 0o600)) }
	write(stranger.CA)
	f, proxy := newBoundWorld(t, func(p *upstream.TokenProxy) { p.CAFile, p.CAData = file, "" })
	status, _ := f.asks(ofCart, vault)
	assert.Equal(t, 503, status)
	write(proxy.CA)
	status, body := f.asks(ofCart, graph)
	assert.Equal(t, 200, status, body)
	write(nil) // half-way through a renewal
	status, body = f.asks(ofCart, management)
	assert.Equal(t, 200, status, body)
	write(stranger.CA) // the old one counts no more, on connections that are open neither
	status, _ = f.asks(ofCart, "https://storage.azure.com/")
	assert.Equal(t, 503, status)
}
