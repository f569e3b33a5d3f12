package upstream

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
	"github.com/podidentity/nmi/tokencache/limiter"
)

const (
	clientID     = "5e271c00-0000-4000-8000-000000000001"
	tenant       = "7e9a9700-0000-4000-8000-000000000001"
	clientSecret = "s3cr3t~of.the-principal"
	password     = "p4ssword of the file"
)

// pair is a valid certificate and its key, made once.
var pair = sync.OnceValues(func() (*x509.Certificate, *rsa.PrivateKey) {
	return entratest.NewCertificate(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
})

// principals is an Entra that knows one service principal, and an upstream that
// reads the secrets of a map.
type principals struct {
	*Upstream
	entra     *entratest.Server
	authority string
	secrets   map[string]map[string][]byte // by name, all in namespace shop
	err       error                        // of reading one
	mu        sync.Mutex                   // guards reads
	reads     int
}

func newPrincipals(t *testing.T, change func(*Config)) *principals {
	t.Helper()
	certificate, _ := pair()
	p := &principals{
		entra: entratest.NewServer(entratest.Config{
			Principals: []entratest.Principal{{ClientID: clientID, Tenants: []string{tenant}, Secret: clientSecret, Certificate: certificate}},
			Resources:  []string{"https://vault.azure.net", "https://vault.azure.net/"},
		}),
		secrets: map[string]map[string][]byte{"sp": {"clientsecret": []byte(clientSecret)}},
	}
	srv := p.entra.Start()
	t.Cleanup(srv.Close)
	p.authority = srv.URL
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	host, err := ParseAuthority(srv.URL)
	require.NoError(t, err)
	cfg := Config{
		IMDS: &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, UserAgent: "nmi/test",
		Authorities: []string{host}, Roots: roots,
		Secret: func(_ context.Context, namespace, name string) (map[string][]byte, error) {
			p.mu.Lock()
			p.reads++
			p.mu.Unlock()
			if p.err != nil {
				return nil, p.err
			}
			if data, ok := p.secrets[name]; ok && namespace == "shop" {
				return data, nil
			}
			return nil, fmt.Errorf("%w: there is no such secret", ErrNoSecret)
		},
	}
	if change != nil {
		change(&cfg)
	}
	p.Upstream = New(cfg)
	t.Cleanup(p.Close)
	return p
}

// limits replaces the limiter of the authority.
func (p *principals) limits(l slotLimiter) {
	host, _ := ParseAuthority(p.authority)
	p.Upstream.entra.limiters[host] = l
}

func (p *principals) key(change func(*tokencache.Principal)) tokencache.Key {
	principal := tokencache.Principal{TenantID: tenant, Authority: p.authority, SecretNamespace: "shop", SecretName: "sp"}
	if change != nil {
		change(&principal)
	}
	return tokencache.Key{ClientID: clientID, Resource: "https://vault.azure.net/", Principal: unique.Make(principal)}
}

func byCertificate(p *tokencache.Principal) { p.Certificate = true }

// fails asks for a token, and checks what every failure must be.
func (p *principals) fails(t *testing.T, key tokencache.Key) error {
	t.Helper()
	token, err := p.Token(t.Context(), asking(key))
	require.Error(t, err)
	assert.Nil(t, token)
	for _, secret := range []string{clientSecret, password, "PRIVATE KEY", "eyJ"} {
		assert.NotContains(t, err.Error(), secret)
	}
	return err
}

func classOf(err error) tokencache.Class {
	var classed interface{ Class() tokencache.Class }
	if errors.As(err, &classed) {
		return classed.Class()
	}
	return tokencache.Unavailable
}

func TestATokenByClientSecret(t *testing.T) {
	p := newPrincipals(t, nil)
	ask := asking(p.key(nil))
	slots := &countedLimiter{Limiter: limiter.New(1000, 1000)}
	p.limits(slots)
	token, err := p.Token(t.Context(), ask)
	require.NoError(t, err)
	slots.check(t, 1) // for all requests of a fetch
	assert.Zero(t, slots.PausedUntil())
	assert.Equal(t, clientID, imdstest.Subject(token.AccessToken))
	assert.Equal(t, tenant, entratest.Tenant(token.AccessToken))
	assert.Equal(t, clientID, token.ClientID)
	assert.Equal(t, "https://vault.azure.net/", token.Resource)
	assert.Equal(t, "Bearer", token.TokenType)
	now := time.Now()
	assert.Equal(t, time.Hour, token.ExpiresIn)
	assert.WithinDuration(t, now.Add(time.Hour), token.ExpiresOn, time.Minute)
	assert.WithinDuration(t, now.Add(30*time.Minute), token.RefreshOn, time.Minute)
	assert.WithinDuration(t, now.Add(2*time.Hour), token.ExtExpiresOn, time.Minute)

	calls := p.entra.Calls()
	require.Len(t, calls, 2, "where tokens are, and a token; no instance discovery")
	assert.Equal(t, "/"+tenant+"/v2.0/.well-known/openid-configuration", calls[0].Path)
	assert.Equal(t, "/"+tenant+"/oauth2/v2.0/token", calls[1].Path)
	assert.Equal(t, "https://vault.azure.net//.default", strings.Fields(calls[1].Scope)[0])
	assert.Equal(t, "nmi/test", calls[1].UserAgent)
}

func TestATokenByCertificate(t *testing.T) {
	certificate, key := pair()
	other, _ := entratest.NewCertificate(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	for name, encoder := range map[string]*pkcs12.Encoder{
		"AES, as OpenSSL 3 writes it": pkcs12.Modern,
		"AES, as OpenSSL 3.4 can":     pkcs12.Modern2026,
		"3DES":                        pkcs12.LegacyDES,
		"RC2, as Windows wrote it":    pkcs12.LegacyRC2,
		"without a password":          pkcs12.Passwordless,
	} {
		t.Run(name, func(t *testing.T) {
			p := newPrincipals(t, nil)
			word := password
			if encoder == pkcs12.Passwordless {
				word = ""
			}
			file, err := encoder.Encode(key, certificate, []*x509.Certificate{other}, word)
			require.NoError(t, err)
			p.secrets["sp"] = map[string][]byte{"certificate": file}
			if word != "" {
				p.secrets["sp"]["password"] = []byte(word + "\n") // as from a file
			}
			token, err := p.Token(t.Context(), asking(p.key(byCertificate)))
			require.NoError(t, err)
			assert.Equal(t, clientID, imdstest.Subject(token.AccessToken))
		})
	}
}

// TestEachFetchReadsAndAsksAnew: a changed secret counts from the next fetch, and
// a refresh brings another token.
func TestEachFetchReadsAndAsksAnew(t *testing.T) {
	p := newPrincipals(t, nil)
	first, err := p.Token(t.Context(), asking(p.key(nil)))
	require.NoError(t, err)
	second, err := p.Token(t.Context(), asking(p.key(nil)))
	require.NoError(t, err)
	assert.NotEqual(t, first.AccessToken, second.AccessToken)
	assert.Equal(t, 2, p.reads)

	p.entra.SetSecret(clientID, "another")
	p.fails(t, p.key(nil))
	p.secrets["sp"] = map[string][]byte{"clientsecret": []byte("another")}
	_, err = p.Token(t.Context(), asking(p.key(nil)))
	require.NoError(t, err)
}

func TestEntrasRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*principals, *tokencache.Key)
		status int
		code   string
		text   string
	}{
		"wrong secret": {func(p *principals, _ *tokencache.Key) {
			p.secrets["sp"] = map[string][]byte{"clientsecret": []byte("not this one")}
		}, 401, "invalid_client", "AADSTS7000215: Invalid client secret provided."},
		"unknown application": {func(_ *principals, k *tokencache.Key) { k.ClientID = "5e271c00-0000-4000-8000-00000000dead" }, 400, "unauthorized_client", "AADSTS700016: "},
		"unknown resource":    {func(_ *principals, k *tokencache.Key) { k.Resource = "https://nothing.example" }, 400, "invalid_resource", "AADSTS500011: "},
		"unknown tenant": {func(p *principals, k *tokencache.Key) {
			*k = p.key(func(principal *tokencache.Principal) { principal.TenantID = "nowhere.example" })
		}, 400, "invalid_tenant", "AADSTS90002: "},
		"another's certificate": {func(p *principals, k *tokencache.Key) {
			*k = p.key(byCertificate)
			certificate, key := entratest.NewCertificate(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
			file, err := pkcs12.Modern.Encode(key, certificate, nil, "")
			if err != nil {
				panic(err)
			}
			p.secrets["sp"] = map[string][]byte{"certificate": file}
		}, 401, "invalid_client", "AADSTS700027: "},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPrincipals(t, nil)
			key := p.key(nil)
			tc.change(p, &key)
			err := p.fails(t, key)
			var refused *Error
			require.ErrorAs(t, err, &refused)
			assert.Equal(t, "Entra", refused.Source)
			assert.Equal(t, tc.status, refused.Status)
			assert.Equal(t, tc.code, refused.Code)
			assert.True(t, strings.HasPrefix(refused.Description, tc.text), refused.Description)
			assert.Equal(t, tokencache.Refused, classOf(err))
			assert.True(t, strings.HasPrefix(err.Error(), "Entra answered "), err)
		})
	}
}

func TestWhatPassesAtEntra(t *testing.T) {
	p := newPrincipals(t, nil)
	p.entra.Inject(entratest.Fault{Status: 503, Body: "<html>"})
	_, err := p.Token(t.Context(), asking(p.key(nil)))
	require.NoError(t, err, "tried again")

	p.entra.Inject(entratest.Fault{Status: 429, RetryAfter: "17", Body: `{"error":"temporarily_unavailable","error_description":"AADSTS90055: too many"}`})
	before := len(p.entra.Calls())
	err = p.fails(t, p.key(nil))
	assert.Equal(t, tokencache.Throttled, classOf(err))
	var refused *Error
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, 17*time.Second, refused.Wait())
	assert.Equal(t, 2, len(p.entra.Calls())-before, "a throttled service is left alone")
	p.entra.Inject(entratest.Fault{Status: 429, RetryAfter: "1"}) // so soon that azcore would wait for it
	assert.Equal(t, tokencache.Throttled, classOf(p.fails(t, p.key(nil))))

	for _, fault := range []entratest.Fault{
		{Status: 400, Body: `{"error":"temporarily_unavailable","error_description":"AADSTS90033: A transient error has occurred."}`},
		{Status: 403, Body: `<html>the proxy says no</html>`},
		{Status: 302},
	} {
		p.entra.Inject(fault)
		err = p.fails(t, p.key(nil))
		assert.Equal(t, tokencache.Unavailable, classOf(err), err)
		assert.NotContains(t, err.Error(), "html")
	}
	for _, body := range []string{
		`{"access_token":"eyJ-token","expires_in":"soon","token_type":"Bearer"}`,
		`eyJ-token`,
		`{"access_token":"eyJ-token\n","expires_in":3600,"token_type":"Bearer"}`,
		`{"access_token":"eyJ-token","expires_in":3600,"token_type":"pop"}`,
		`{"access_token":"eyJ-token","expires_in":31536000,"token_type":"Bearer"}`,
		`{"access_token":"eyJ-token","expires_in":-1,"token_type":"Bearer"}`,
		`{"access_token":"","expires_in":3600,"token_type":"Bearer"}`,
	} {
		p.entra.Inject(entratest.Fault{Status: 200, Body: body})
		err = p.fails(t, p.key(nil))
		require.ErrorIs(t, err, ErrEntra, body)
		assert.Equal(t, tokencache.Unavailable, classOf(err))
	}
}

func TestEntraIsDown(t *testing.T) {
	p := newPrincipals(t, func(c *Config) { c.Authorities = []string{closedAddr} })
	err := p.fails(t, p.key(func(k *tokencache.Principal) { k.Authority = "https://" + closedAddr }))
	require.ErrorIs(t, err, ErrEntra)
	assert.ErrorContains(t, err, "connection refused")
	assert.Equal(t, tokencache.Unavailable, classOf(err))

	p = newPrincipals(t, func(c *Config) { c.Roots = x509.NewCertPool() })
	err = p.fails(t, p.key(nil))
	require.ErrorIs(t, err, ErrEntra)
	assert.ErrorContains(t, err, "certificate signed by unknown authority")

	hanging := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer hanging.Close()
	p = newPrincipals(t, func(c *Config) {
		c.Roots.AddCert(hanging.Certificate())
		c.Authorities = []string{strings.TrimPrefix(hanging.URL, "https://")}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	ask := asking(p.key(func(k *tokencache.Principal) { k.Authority = hanging.URL }))
	_, err = p.Token(ctx, ask)
	require.ErrorIs(t, err, ErrEntra)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	err = new(exchange).explain(ctx, errors.New("a text"), time.Now()) // over before anything was asked
	require.ErrorIs(t, err, ErrEntra)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestEntrasTransport(t *testing.T) {
	transport := newPrincipals(t, nil).Upstream.entra.transport
	assert.NotNil(t, transport.Proxy, "the environment's proxy is honoured")
	assert.EqualValues(t, 0x0303, transport.TLSClientConfig.MinVersion, "TLS 1.2")
	assert.Positive(t, transport.MaxIdleConns)
}
