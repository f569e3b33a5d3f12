package proxy

import (
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

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

func TestFederatedToken(t *testing.T) {
	f := newFederationWorld(t, nil)
	for _, tc := range []struct{ from, query, client, tenant string }{
		{ofCart, vault, cartID, tenantA},
		{ofCart, vault + "&client_id=" + strings.ToUpper(moreID), moreID, tenantA},
		{ofReport, vault, reportID, tenantB},
		{byBinding, vault, boundID, tenantA},
	} {
		status, body := f.asks(tc.from, tc.query)
		require.Equal(t, 200, status, body)
		assert.Equal(t, tc.client, tokenSubject(body))
		assert.Equal(t, tc.tenant, entratest.Tenant(accessToken(t, body)))
	}
	assert.Equal(t, []tokencache.ServiceAccount{
		{Namespace: "shop", Name: "cart", UID: "uid-of-cart"},
		{Namespace: "shop", Name: "cart", UID: "uid-of-cart"},
		{Namespace: "shop", Name: "report", UID: "uid-of-report"},
		{Namespace: "shop", Name: "batch", UID: "uid-of-batch"},
	}, f.requests)
	_, first := f.asks(ofCart, vault)
	_, second := f.asks(ofCartToo, vault)
	assert.Equal(t, accessToken(t, first), accessToken(t, second), "pods of one service account share")
	assert.Equal(t, 4, f.requested())
	assert.Equal(t, 4, f.entra.Tokens())

	status, body := f.asks(ofReport, vault+"&client_id="+cartID)
	assert.Equal(t, 400, status)
	assert.Contains(t, body, "Identity not found", "another's service account")
}

// TestOneExchangeForManyCallers: a cold key makes one TokenRequest and one exchange.
func TestOneExchangeForManyCallers(t *testing.T) {
	f := newFederationWorld(t, nil)
	const many = 10_000
	key := f.key(ofCart, vault)
	var asking sync.WaitGroup
	begin := make(chan struct{})
	for range many {
		asking.Go(func() {
			<-begin
			token, err := f.tokens.Get(t.Context(), key, netip.MustParseAddr(ofCart))
			if assert.NoError(t, err) {
				assert.Equal(t, cartID, token.ClientID)
			}
		})
	}
	close(begin)
	asking.Wait()
	assert.Equal(t, 1, f.requested())
	assert.Equal(t, 1, f.entra.Tokens())
}

// key is the key of a pod's default identity.
func (f *federationWorld) key(from, resource string) tokencache.Key {
	f.t.Helper()
	id, err := f.resolver.Owner(netip.MustParseAddr(from)).Identity(podresolver.Selector{})
	require.NoError(f.t, err)
	return keyOf(id, resource)
}

func TestFederationRefusals(t *testing.T) {
	credential := entratest.FederatedCredential{Issuer: issuerURL, Subject: entratest.Subject("shop", "cart"), Audience: exchangeTo}
	for name, tc := range map[string]struct {
		breaks func(*federationWorld)
		from   string
		status int
		says   string // to the pod
		reason string
		log    string
	}{
		"no federated credential": {
			breaks: func(f *federationWorld) { f.entra.SetFederated(cartID) }, status: 400, says: "AADSTS70021: No matching federated identity record found",
			reason: FederationUnknown, log: `for the token with subject "system:serviceaccount:shop:cart", issuer "https://oidc.example/cluster" and audience "api://AzureADTokenExchange" Entra answered 401 invalid_client: AADSTS70021`,
		},
		"of another issuer": {
			breaks: func(f *federationWorld) {
				c := credential
				c.Issuer = "https://other/"
				f.entra.SetFederated(cartID, c)
			},
			status: 400, says: "AADSTS700211", reason: FederationUnknown, log: `issuer "https://oidc.example/cluster"`,
		},
		"of another subject": {
			breaks: func(f *federationWorld) { c := credential; c.Subject += "s"; f.entra.SetFederated(cartID, c) },
			status: 400, says: "AADSTS700213", reason: FederationUnknown, log: `subject "system:serviceaccount:shop:cart"`,
		},
		"of another audience": {
			breaks: func(f *federationWorld) { f.api(func() { f.audience = "api://AKSIdentityBinding" }) }, status: 400, says: "AADSTS700212", reason: FederationUnknown,
		},
		"wrong tenant": {
			breaks: func(f *federationWorld) {
				f.cluster.Modify(account("cart", cartID, podresolver.TenantIDAnnotation, tenantB))
				f.eventually(func() bool { p, _ := f.key(ofCart, "").FromEntra(); return p.TenantID == tenantB }, "the annotation")
			}, status: 400, says: "AADSTS700016", reason: EntraRefused, log: "AADSTS700016",
		},
		"clock ahead":  {breaks: func(f *federationWorld) { f.api(func() { f.clock = time.Hour }) }, status: 400, says: "AADSTS700024", reason: EntraRefused},
		"clock behind": {breaks: func(f *federationWorld) { f.api(func() { f.clock = -time.Hour }) }, status: 400, says: "AADSTS700024", reason: EntraRefused},
		"not allowed": {breaks: func(f *federationWorld) {
			f.api(func() { f.down = fmt.Errorf("%w: no role", upstream.ErrNoServiceAccountToken) })
		}, status: 400, says: "The credential of this identity cannot be used", reason: CredentialUnusable, log: "service account shop/cart: its token cannot be requested: no role"},
		"API server off": {breaks: func(f *federationWorld) { f.api(func() { f.down = errors.New("connection refused") }) }, status: 503, says: "The credential of this identity cannot be read now", reason: CredentialUnusable, log: "service account shop/cart: connection refused"},
		"Entra away": {breaks: func(f *federationWorld) {
			f.entra.Inject(entratest.Fault{Status: 503}, entratest.Fault{Status: 503}, entratest.Fault{Status: 503})
		}, status: 503, says: "Entra is not available", reason: EntraUnavailable},
		"throttled": {breaks: func(f *federationWorld) {
			f.entra.Inject(entratest.Fault{Status: 429, RetryAfter: "9", Body: `{"error":"temporarily_unavailable"}`})
		}, status: 429, says: "throttled", reason: Throttled},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFederationWorld(t, nil)
			status, body := f.asks(ofCart, vault)
			require.Equal(t, 200, status, body)
			tc.breaks(f)
			status, body = f.asks(ofCart, graph)
			assert.Equal(t, tc.status, status)
			assert.Contains(t, body, tc.says)
			refusals := f.server.Refusals(netip.MustParseAddr(ofCart))
			require.NotEmpty(t, refusals)
			assert.Equal(t, tc.reason, refusals[0].Reason)
			assert.Contains(t, strings.ReplaceAll(f.log.String(), `\"`, `"`), tc.log)
			assert.Contains(t, refusals[0].Text, tc.log)
			if name != "wrong tenant" { // which is another key
				status, _ = f.asks(ofCart, vault)
				assert.Equal(t, 200, status, "what is in memory is served")
			}
		})
	}
}

// TestUnknownAuthority: a token of a service account is sent to no host that is not allowed, and
// not even requested.
func TestUnknownAuthority(t *testing.T) {
	f := newFederationWorld(t, func(c *upstream.Config) { c.Authorities = nil })
	status, body := f.asks(ofCart, vault)
	assert.Equal(t, 400, status)
	assert.Equal(t, noCredentialBody, body)
	assert.Zero(t, f.requested())
	assert.Empty(t, f.entra.Calls())
	assert.Contains(t, f.log.String(), "--entra-authority")
}

// TestDropUnused: tokens go with what entitles the node's pods to them.
func TestDropUnused(t *testing.T) {
	held := func(f *federationWorld, of ...string) (all int) {
		for _, ip := range of {
			_, n := f.tokens.HeldBy(netip.MustParseAddr(ip), 0)
			all += n
		}
		return all
	}
	newHeld := func(t *testing.T) *federationWorld {
		t.Helper()
		f := newFederationWorld(t, nil)
		for _, from := range []string{ofCart, ofReport, byBinding} {
			status, body := f.asks(from, vault)
			require.Equal(t, 200, status, body)
		}
		_, _ = f.asks(ofCart, management)
		require.Equal(t, 4, held(f, ofCart, ofReport, byBinding))
		return f
	}
	t.Run("the last pod", func(t *testing.T) {
		f := newHeld(t)
		f.cluster.Delete(podOf("cart", "cart-0", ofCart, ""))
		f.eventually(func() bool { return f.resolver.Owner(netip.MustParseAddr(ofCart)) == nil }, "the first to go")
		assert.Equal(t, 2, held(f, ofCart), "another pod has the service account")
		f.cluster.Delete(podOf("cart", "cart-1", ofCartToo, ""))
		f.eventually(func() bool { return held(f, ofCart) == 0 }, "its tokens to go")
		assert.Equal(t, 2, held(f, ofReport, byBinding))
		f.cluster.Delete(podOf("batch", "batch-0", byBinding, "batch"))
		f.eventually(func() bool { return held(f, byBinding) == 0 }, "those of a federated AzureIdentity to go, too")
	})
	t.Run("another annotation", func(t *testing.T) {
		f := newHeld(t)
		f.cluster.Modify(account("cart", moreID))
		f.eventually(func() bool { return held(f, ofCart) == 0 }, "its tokens to go")
		_, body := f.asks(ofCart, vault)
		assert.Equal(t, moreID, tokenSubject(body))
	})
	t.Run("created anew", func(t *testing.T) {
		f := newHeld(t)
		again := resolvertest.ServiceAccount("cart", map[string]string{podresolver.ClientIDAnnotation: cartID})
		again.UID = types.UID("another")
		f.cluster.Modify(again)
		f.eventually(func() bool { return held(f, ofCart) == 0 }, "its tokens to go")
		requested := f.requested()
		status, _ := f.asks(ofCart, vault)
		assert.Equal(t, http.StatusOK, status)
		assert.Equal(t, tokencache.ServiceAccount{Namespace: "shop", Name: "cart", UID: "another"}, f.requests[requested])
	})
}

// TestFederatedHitAllocations: a token in memory costs what any does.
func TestFederatedHitAllocations(t *testing.T) {
	f := newFederationWorld(t, nil)
	_, body := f.asks(ofCart, vault)
	require.Equal(t, cartID, tokenSubject(body))
	pod := f.resolver.Owner(netip.MustParseAddr(ofCart))
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		id, err := pod.Identity(podresolver.Selector{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.tokens.GetAt(now, keyOf(id, vault), netip.MustParseAddr(ofCart), time.Now()); err != nil {
			t.Fatal(err)
		}
	}))
}

// BenchmarkKey is what a hit of a federated identity costs more than another one.
func BenchmarkKey(b *testing.B) {
	f := &podresolver.Principal{TenantID: tenantA, Authority: "https://login.microsoftonline.com", ServiceAccount: podresolver.ServiceAccount{Namespace: "shop", Name: "cart", UID: tenantB}}
	for name, id := range map[string]podresolver.Identity{"IMDS": {ClientID: cartID}, "federated": {ClientID: cartID, Principal: f}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var keep tokencache.Key
			for b.Loop() {
				keep = keyOf(id, vault)
			}
			_ = keep
		})
	}
}
