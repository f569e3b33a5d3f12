package proxy

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// Pods of service principals. The label of each is the name of its identity.
const (
	bySecret  = "127.0.0.11"
	byFile    = "127.0.0.12"
	ofTenants = "127.0.0.13"
	toEvil    = "127.0.0.14"
)

const (
	tenantA = "7e9a9700-0000-4000-8000-00000000000a"
	tenantB = "7e9a9700-0000-4000-8000-00000000000b"

	secretID   = "5e271c00-0000-4000-8000-000000000001"
	fileID     = "5e271c00-0000-4000-8000-000000000002"
	theSecret  = "s3cr3t~of.the-principal"
	filePasswd = "p4ssword of the file"
)

const askFor = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource="

// theFile is a certificate as Entra knows it, and as a Secret has it.
var theFile = sync.OnceValues(func() (*x509.Certificate, []byte) {
	certificate, key := entratest.NewCertificate(time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	file, err := pkcs12.Modern.Encode(key, certificate, nil, filePasswd)
	if err != nil {
		panic(err)
	}
	return certificate, file
})

// principalWorld is a world whose pods are bound to service principals.
type principalWorld struct {
	*world
	entra *entratest.Server

	mu      sync.Mutex // guards the rest
	secrets map[string]map[string][]byte
	down    error // of the API server
	reads   int
}

func newPrincipalWorld(t *testing.T) *principalWorld {
	t.Helper()
	certificate, file := theFile()
	imds := imdstest.NewServer(imdstest.Config{})
	p := &principalWorld{
		world: &world{t: t, imds: imds, log: &lockedBuffer{}},
		entra: entratest.NewServer(entratest.Config{
			Principals: []entratest.Principal{
				{ClientID: secretID, Tenants: []string{tenantA, tenantB}, Secret: theSecret},
				{ClientID: fileID, Tenants: []string{tenantA}, Certificate: certificate},
			},
			Resources: []string{vault, management, graph},
		}),
		secrets: map[string]map[string][]byte{
			"shop/client-secret": {"clientsecret": []byte(theSecret)},
			"shop/file":          {"certificate": file, "password": []byte(filePasswd)},
		},
	}
	log := slog.New(slog.NewTextHandler(p.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	fakeEntra := p.entra.Start()
	t.Cleanup(fakeEntra.Close)
	fakeIMDS := imds.Start()
	t.Cleanup(fakeIMDS.Close)
	base, err := url.Parse(fakeIMDS.URL)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(fakeEntra.Certificate())
	up := upstream.New(upstream.Config{
		IMDS: base, UserAgent: "nmi/test", Secret: p.secret, Roots: roots,
		Authorities: []string{strings.TrimPrefix(fakeEntra.URL, "https://")},
	})
	t.Cleanup(up.Close)
	tokens := tokencache.New(up.Token, tokencache.Config{})
	t.Cleanup(tokens.Close)

	resolver, err := podresolver.New(boundTo(fakeEntra.URL).Sources(), podresolver.Config{Node: "node1", Logger: log})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); p.running.Wait() })
	p.running.Go(func() { resolver.Run(ctx) })
	<-resolver.Synced()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p.addr = ln.Addr().String()
	p.server = New(Config{Pods: resolver, Tokens: tokens, Upstream: up, Logger: log})
	p.running.Go(func() { assert.NoError(t, p.server.Serve(ctx, ln)) })
	t.Cleanup(func() { // whatever a test was about
		for _, secret := range []string{theSecret, filePasswd, base64.StdEncoding.EncodeToString(file)[:64], "eyJ", "PRIVATE KEY"} {
			assert.NotContains(t, p.log.String(), secret)
		}
		assert.Zero(t, imds.Requests(), "IMDS has no part in it")
	})
	return p
}

// boundTo is a cluster with a pod for each identity.
func boundTo(authority string) *resolvertest.Cluster {
	var objects []runtime.Object
	add := func(name, ip string, spec aadpodidentity.AzureIdentitySpec) {
		if spec.ADEndpoint == "" {
			spec.ADEndpoint = authority
		}
		meta := metav1.ObjectMeta{Namespace: "shop", Name: name}
		labelled := meta
		labelled.Labels = map[string]string{aadpodidentity.BindingLabel: name}
		objects = append(objects,
			&corev1.Pod{ObjectMeta: labelled, Spec: corev1.PodSpec{NodeName: "node1"}, Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip}},
			&aadpodidentity.AzureIdentity{ObjectMeta: meta, Spec: spec},
			&aadpodidentity.AzureIdentityBinding{ObjectMeta: meta, Spec: aadpodidentity.AzureIdentityBindingSpec{AzureIdentity: name, Selector: name}})
	}
	withSecret := aadpodidentity.AzureIdentitySpec{
		Type: aadpodidentity.ServicePrincipal, ClientID: strings.ToUpper(secretID), TenantID: tenantA,
		ClientPassword: aadpodidentity.SecretReference{Name: "client-secret"},
	}
	add("by-secret", bySecret, withSecret)
	add("by-file", byFile, aadpodidentity.AzureIdentitySpec{
		Type: aadpodidentity.ServicePrincipalCertificate, ClientID: fileID, TenantID: tenantA,
		ClientPassword: aadpodidentity.SecretReference{Name: "file", Namespace: "shop"},
	})
	tenants, evil := withSecret, withSecret
	tenants.AuxiliaryTenantIDs = []string{tenantB}
	add("of-tenants", ofTenants, tenants)
	evil.ADEndpoint = "https://login.evil.example/"
	add("to-evil", toEvil, evil)
	return resolvertest.NewCluster(objects...)
}

func (p *principalWorld) secret(_ context.Context, namespace, name string) (map[string][]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads++
	if p.down != nil {
		return nil, p.down
	}
	if data, ok := p.secrets[namespace+"/"+name]; ok {
		return data, nil
	}
	return nil, fmt.Errorf("%w: there is no such secret", upstream.ErrNoSecret)
}

func (p *principalWorld) setSecret(name string, data map[string][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secrets[name] = data
}

// asks asks for a resource, which gives status and body.
func (p *principalWorld) asks(from, resource string) (int, string) {
	p.t.Helper()
	resp, body := p.get(from, askFor+resource)
	assert.True(p.t, json.Valid([]byte(body)), body)
	if resp.StatusCode == 503 {
		assert.NotEmpty(p.t, resp.Header.Get("Retry-After"))
	}
	return resp.StatusCode, body
}

const (
	vault      = "https://vault.azure.net/"
	management = "https://management.azure.com/"
	graph      = "https://graph.microsoft.com/"
)

func TestServicePrincipalsGetTokensOfEntra(t *testing.T) {
	p := newPrincipalWorld(t)
	for from, id := range map[string]string{bySecret: secretID, byFile: fileID} {
		before := p.entra.Tokens()
		status, body := p.asks(from, vault)
		require.Equal(t, 200, status, body)
		assert.Equal(t, id, whose(body))
		var fields map[string]string // every one a string, or this fails
		require.NoError(t, json.Unmarshal([]byte(body), &fields))
		assert.Len(t, fields, 8)
		assert.Equal(t, id, fields["client_id"])
		assert.Equal(t, vault, fields["resource"])
		_, body = p.asks(from, vault+"&client_id="+strings.ToUpper(id))
		assert.Equal(t, id, whose(body))
		assert.Equal(t, 1, p.entra.Tokens()-before, "the second came from memory")
	}
}

func TestAuxiliaryTenantsMakeAnArray(t *testing.T) {
	p := newPrincipalWorld(t)
	status, body := p.asks(ofTenants, vault)
	require.Equal(t, 200, status, body)
	var all []map[string]string
	require.NoError(t, json.Unmarshal([]byte(body), &all))
	require.Len(t, all, 2)
	for i, tenant := range []string{tenantA, tenantB} {
		assert.Len(t, all[i], 8)
		assert.Equal(t, secretID, imdstest.Subject(all[i]["access_token"]))
		assert.Equal(t, tenant, entratest.Tenant(all[i]["access_token"]), "the primary first")
	}
	assert.Equal(t, 2, p.entra.Tokens())
	_, again := p.asks(ofTenants, vault)
	require.NoError(t, json.Unmarshal([]byte(again), &all))
	_, one := p.asks(bySecret, vault)
	assert.Equal(t, secretID, whose(one), "another identity of the same principal: no array")
	assert.Equal(t, 2, p.entra.Tokens(), "and the token that is there already")
}

func TestAnAuxiliaryTenantsFailureIsTheRequests(t *testing.T) {
	p := newPrincipalWorld(t)
	p.entra.Inject(entratest.Fault{Status: 200, Body: `{"access_token":"eyA.0","expires_in":3600,"token_type":"Bearer"}`}, // the primary's
		entratest.Fault{Status: 400, Body: `{"error":"unauthorized_client","error_description":"AADSTS700016: not in tenant B"}`})
	status, body := p.asks(ofTenants, vault)
	assert.Equal(t, 400, status)
	assert.JSONEq(t, `{"error":"unauthorized_client","error_description":"AADSTS700016: not in tenant B"}`, body)
	assert.Contains(t, p.log.String(), "auxiliary tenant "+tenantB)
}

func TestAChangedSecretTakesEffectAtTheNextFetch(t *testing.T) {
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

const noCredentialBody = `{"error":"invalid_client","error_description":"The credential of this identity cannot be used; the operators of the cluster find the reason in the log of the node's agent"}`

func TestWhatIsWrongWithASecretIsForTheLog(t *testing.T) {
	_, file := theFile()
	for name, tc := range map[string]struct {
		from string
		data map[string][]byte
		log  string
	}{
		"missing":                {bySecret, nil, "secret shop/client-secret: it cannot be read: there is no such secret"},
		"several keys":           {bySecret, map[string][]byte{"one": []byte(theSecret), "two": []byte(theSecret)}, "secret shop/client-secret: of its keys one, two none is clientsecret"},
		"no keys":                {bySecret, map[string][]byte{}, "secret shop/client-secret: it has no keys"},
		"wrong key":              {byFile, map[string][]byte{"pfx": file}, "secret shop/file: of its keys pfx none is certificate"},
		"wrong password":         {byFile, map[string][]byte{"certificate": file, "password": []byte("wrong")}, "secret shop/file: the password under password is not that of the PKCS12 file in certificate"},
		"no password":            {byFile, map[string][]byte{"certificate": file}, "secret shop/file: the PKCS12 file in certificate has a password"},
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

func TestWhatPassesIsSaidToPass(t *testing.T) {
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

func TestAADSTSReachesThePod(t *testing.T) {
	p := newPrincipalWorld(t)
	status, body := p.asks(bySecret, "https://nothing.example/")
	assert.Equal(t, 400, status)
	var told struct{ Error, Description string }
	require.NoError(t, json.Unmarshal([]byte(strings.Replace(body, "error_description", "Description", 1)), &told))
	assert.Equal(t, "invalid_resource", told.Error)
	assert.True(t, strings.HasPrefix(told.Description, "AADSTS500011: The resource principal named https://nothing.example/ was not found"), told.Description)
	assert.Contains(t, p.log.String(), "AADSTS500011", "operators see it too")
}

// TestTokensInUseAreThoseOfAllTenants: they are refreshed without being asked for as
// long as the pod is there.
func TestTokensInUseAreThoseOfAllTenants(t *testing.T) {
	p := newPrincipalWorld(t)
	inUse := InUse(p.server.cfg.Pods)
	pod, err := p.server.cfg.Pods.Resolve(t.Context(), netip.MustParseAddr(ofTenants))
	require.NoError(t, err)
	id, err := pod.Identity(podresolver.Selector{})
	require.NoError(t, err)
	keys := append(auxiliaryKeys(id, vault), keyOf(id, vault))
	require.Len(t, keys, 2)
	for _, key := range keys {
		assert.True(t, inUse(netip.MustParseAddr(ofTenants), key), key)
	}
	stray := keys[0]
	stray.Principal = principalIn(id, "another tenant")
	assert.False(t, inUse(netip.MustParseAddr(ofTenants), stray))
	assert.False(t, inUse(netip.MustParseAddr(bySecret), keys[0]), "it has no auxiliary tenants")
}
