package proxy

import (
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"log/slog"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// Pods of the federation world. The service accounts of the first three are annotated.
const (
	ofCart    = "127.0.0.21"
	ofCartToo = "127.0.0.22" // with cart's service account
	ofReport  = "127.0.0.23" // whose tenant is another
	byBinding = "127.0.0.24" // bound to a federated AzureIdentity
)

const (
	cartID     = "fed00000-0000-4000-8000-00000000000c"
	moreID     = "fed00000-0000-4000-8000-00000000000d"
	reportID   = "fed00000-0000-4000-8000-00000000000e"
	boundID    = "fed00000-0000-4000-8000-00000000000f"
	boundPath  = "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/bound"
	issuerURL  = "https://oidc.example/cluster"
	exchangeTo = "api://AzureADTokenExchange"
)

// federationWorld is a world whose pods get their tokens by federation.
type federationWorld struct {
	*world
	entra    *entratest.Server
	issuer   *entratest.Issuer
	cluster  *resolvertest.Cluster
	tokens   *tokencache.Cache
	resolver *podresolver.Resolver

	mu       sync.Mutex // guards the rest
	requests []tokencache.ServiceAccount
	audience string
	down     error         // of the API server
	clock    time.Duration // by which it is ahead
	issued   []string
}

func account(name, clientID string, more ...string) runtime.Object {
	annotations := map[string]string{podresolver.ClientIDAnnotation: clientID}
	for i := 0; i < len(more); i += 2 {
		annotations[more[i]] = more[i+1]
	}
	return resolvertest.ServiceAccount(name, annotations)
}

func podOf(account, name, ip, label string) runtime.Object {
	p := resolvertest.Pod(name, ip, label)
	p.Spec.ServiceAccountName = account
	return p
}

func newFederationWorld(t *testing.T, change func(*upstream.Config)) *federationWorld {
	t.Helper()
	return newFederationWorldIn(t, "", func(_ *federationWorld, c *upstream.Config) {
		if change != nil {
			change(c)
		}
	})
}

// newFederationWorldIn is newFederationWorld with another authority, unless that is "".
func newFederationWorldIn(t *testing.T, authority string, change func(*federationWorld, *upstream.Config), unknownResources ...string) *federationWorld {
	t.Helper()
	f := &federationWorld{world: &world{t: t, imds: imdstest.NewServer(imdstest.Config{}), log: &testlog.Buffer{}}, issuer: entratest.NewIssuer(issuerURL), audience: exchangeTo}
	trusted := func(clientID, account string, tenants ...string) entratest.Principal {
		return entratest.Principal{ClientID: clientID, Tenants: tenants, Federated: []entratest.FederatedCredential{{Issuer: issuerURL, Subject: entratest.Subject("shop", account), Audience: exchangeTo}}}
	}
	f.entra = entratest.NewServer(entratest.Config{
		Principals: []entratest.Principal{trusted(cartID, "cart", tenantA), trusted(moreID, "cart", tenantA), trusted(reportID, "report", tenantB), trusted(boundID, "batch", tenantA)},
		Resources:  []string{vault, management, graph}, UnknownResources: unknownResources,
		Issuers: map[string]*rsa.PublicKey{issuerURL: f.issuer.Key()},
	})
	fakeEntra := f.entra.Start()
	t.Cleanup(fakeEntra.Close)
	fakeIMDS := f.imds.Start()
	t.Cleanup(fakeIMDS.Close)
	base, err := url.Parse(fakeIMDS.URL)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(fakeEntra.Certificate())
	cfg := upstream.Config{
		IMDS: base, UserAgent: "nmi/test", ServiceAccountToken: f.token, Roots: roots,
		Authorities: []string{strings.TrimPrefix(fakeEntra.URL, "https://")},
	}
	change(f, &cfg)
	up := upstream.New(cfg)
	t.Cleanup(up.Close)
	federated := resolvertest.Federated(resolvertest.Identity("bound", boundID, boundPath))
	f.cluster = resolvertest.NewCluster(
		account("cart", cartID, podresolver.AdditionalClientIDsAnnotation, moreID), account("report", reportID, podresolver.TenantIDAnnotation, tenantB), resolvertest.ServiceAccount("batch", nil),
		podOf("cart", "cart-0", ofCart, ""), podOf("cart", "cart-1", ofCartToo, ""), podOf("report", "report-0", ofReport, ""),
		podOf("batch", "batch-0", byBinding, "batch"), federated, resolvertest.Binding("batch", "batch", "bound"),
	)
	t.Cleanup(f.cluster.Close)
	log := slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	resolver, err := podresolver.New(f.cluster.Sources(), podresolver.Config{
		Node: resolvertest.Node, Logger: log, PodWait: 50 * time.Millisecond,
		Federation: podresolver.Federation{ServiceAccounts: true, TenantID: tenantA, Authority: cmp.Or(authority, fakeEntra.URL)},
	})
	require.NoError(t, err)
	f.resolver = run(t, resolver)
	f.tokens = tokencache.New(up.Token, tokencache.Config{InUse: InUse(f.resolver)})
	t.Cleanup(f.tokens.Close)
	ctx, stop := context.WithCancel(context.Background())
	var dropping sync.WaitGroup
	dropping.Go(func() { DropUnused(ctx, f.resolver, f.tokens) })
	t.Cleanup(func() { stop(); dropping.Wait() })
	f.serve(Config{Pods: f.resolver, Tokens: f.tokens, Upstream: up, Logger: log})
	t.Cleanup(f.keptSecret)
	return f
}

// keptSecret checks that no token is anywhere but in responses, whatever a test was about.
func (f *federationWorld) keptSecret() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, call := range f.imds.Calls() { // others are passed through
		assert.NotContains(f.t, call.Target, "oauth2", "IMDS has no part in it")
	}
	said := f.log.String()
	for _, caller := range f.server.RefusedCallers() {
		for _, refusal := range f.server.Refusals(caller) {
			said += refusal.Text
		}
	}
	assert.NotContains(f.t, said, "eyJ")
	for _, token := range f.issued {
		for _, part := range strings.Split(token, ".") {
			assert.NotContains(f.t, said, part)
		}
	}
}

// token is what the API server answers to a TokenRequest.
func (f *federationWorld) token(_ context.Context, account tokencache.ServiceAccount) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, account)
	if f.down != nil {
		return "", f.down
	}
	token := f.issuer.Token(entratest.Subject(account.Namespace, account.Name), f.audience, time.Now().Add(f.clock), 10*time.Minute)
	f.issued = append(f.issued, token)
	return token, nil
}

// api changes how the API server answers.
func (f *federationWorld) api(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *federationWorld) requested() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests)
}

func (f *federationWorld) asks(from, query string) (int, string) {
	f.t.Helper()
	resp, body := f.get(from, askFor+query)
	return resp.StatusCode, body
}

// key is the key of a pod's default identity.
func (f *federationWorld) key(from, resource string) tokencache.Key {
	f.t.Helper()
	id, err := f.resolver.Owner(netip.MustParseAddr(from)).Identity(podresolver.Selector{})
	require.NoError(f.t, err)
	return keyOf(id, resource)
}
