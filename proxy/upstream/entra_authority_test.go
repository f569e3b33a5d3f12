package upstream

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache"
)

func TestNothingIsSentWhereNobodyAllowed(t *testing.T) {
	p := newPrincipals(t, func(c *Config) { c.Authorities = nil })
	for _, authority := range []string{p.authority, "https://login.microsoftonline.com.evil.example", "https://evil.example"} {
		err := p.fails(t, p.key(func(k *tokencache.Principal) { k.Authority = authority }))
		var credential *CredentialError
		require.ErrorAs(t, err, &credential)
		assert.ErrorContains(t, err, "is neither one of Microsoft's nor named by --entra-authority")
		assert.Equal(t, tokencache.Refused, classOf(err))
	}
	for _, authority := range []string{"http://login.microsoftonline.com", "https://login.microsoftonline.com/another-tenant", "https://a@login.microsoftonline.com", "https://", "%"} {
		err := p.fails(t, p.key(func(k *tokencache.Principal) { k.Authority = authority }))
		assert.ErrorContains(t, err, "adEndpoint")
		assert.Equal(t, tokencache.Refused, classOf(err))
	}
	assert.Zero(t, p.reads, "not even read")
	assert.Empty(t, p.entra.Calls())
}

// TestAnAuthorityCannotPointElsewhere: neither by its configuration nor by a
// redirect.
func TestAnAuthorityCannotPointElsewhere(t *testing.T) {
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("was asked") }))
	defer elsewhere.Close()
	tokensAt := elsewhere.URL
	sly := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
			return
		}
		_, _ = fmt.Fprintf(w, `{"issuer":"https://%s/t","token_endpoint":"%s/token","authorization_endpoint":"https://%[1]s/a"}`, r.Host, tokensAt)
	}))
	defer sly.Close()
	p := newPrincipals(t, func(c *Config) {
		c.Roots.AddCert(sly.Certificate())
		c.Authorities = []string{strings.TrimPrefix(sly.URL, "https://")}
	})
	key := p.key(func(k *tokencache.Principal) { k.Authority = sly.URL })
	for _, tokensAt = range []string{elsewhere.URL, strings.Replace(sly.URL, "https:", "http:", 1)} {
		assert.ErrorContains(t, p.fails(t, key), "where nothing is sent")
	}
	tokensAt = sly.URL
	err := p.fails(t, key)
	assert.ErrorContains(t, err, "Entra answered 307")
}

// TestMicrosoftsAuthoritiesNeedNoFlag leads the way to one of them to the stand-in.
func TestMicrosoftsAuthoritiesNeedNoFlag(t *testing.T) {
	p := newPrincipals(t, func(c *Config) { c.Authorities = nil })
	stand := strings.TrimPrefix(p.authority, "https://")
	var dialled []string
	transport := p.Upstream.entra.transport
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled = append(dialled, address)
		return new(net.Dialer).DialContext(ctx, network, stand)
	}
	transport.TLSClientConfig.InsecureSkipVerify = true // the stand-in's certificate has another name
	transport.Proxy = nil
	for _, authority := range []string{"https://login.microsoftonline.com", "https://login.partner.microsoftonline.cn"} {
		_, err := p.Token(t.Context(), asking(p.key(func(k *tokencache.Principal) { k.Authority = authority })))
		require.NoError(t, err)
	}
	assert.Equal(t, []string{"login.microsoftonline.com:443", "login.partner.microsoftonline.cn:443"}, dialled)
	assert.Len(t, p.entra.Calls(), 4, "no instance discovery")
}

func TestParseAuthority(t *testing.T) {
	for text, want := range map[string]string{
		"https://login.microsoftonline.us/": "login.microsoftonline.us",
		"HTTPS://Login.Example:8443":        "login.example:8443",
		"https://login.example:443":         "login.example",
		"login.example":                     "login.example",
		"http://login.example":              "",
		"https://login.example/tenant":      "",
		"https://login.example?x":           "",
		"https://u:p@login.example":         "",
		"https://:443":                      "",
		"":                                  "",
		"https://a b":                       "",
	} {
		host, err := ParseAuthority(text)
		assert.Equal(t, want, host, text)
		assert.Equal(t, want == "", err != nil, text)
	}
	for host := range maps.Keys(hostsOf(nil)) {
		got, err := ParseAuthority("https://" + host + "/")
		require.NoError(t, err)
		assert.Equal(t, host, got)
	}
}
