package proxy

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"
	"software.sslmate.com/src/go-pkcs12"

	"github.com/podidentity/nmi/deploy/testlog"
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
	tenantC = "7e9a9700-0000-4000-8000-00000000000c"

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
		world: &world{t: t, imds: imds, log: &testlog.Buffer{}},
		entra: entratest.NewServer(entratest.Config{
			Principals: []entratest.Principal{
				{ClientID: secretID, Tenants: []string{tenantA, tenantB, tenantC}, Secret: theSecret},
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
	p.serve(Config{Pods: run(t, resolver), Tokens: tokens, Upstream: up, Logger: log})
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
		identity := resolvertest.Identity(name, "", "")
		identity.Spec = spec
		objects = append(objects, resolvertest.Pod(name, ip, name), identity, resolvertest.Binding(name, name, name))
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
	tenants.AuxiliaryTenantIDs = []string{tenantB, tenantC}
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
