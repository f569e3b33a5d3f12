package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

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
