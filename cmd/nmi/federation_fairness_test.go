package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// exchanges is the way of a federated token from the cache to the API server and to Entra.
type exchanges struct {
	cache     *tokencache.Cache
	authority string // of Entra
	nowhere   string // another one that is allowed, and does not answer
}

// newExchanges has Entra take as long as latency for each of a fetch's two requests. Service accounts
// of namespace "gone" do not exist; each has three pods.
func newExchanges(t *testing.T, latency time.Duration) *exchanges {
	t.Helper()
	issuer := entratest.NewIssuer("https://issuer.example")
	entra := entratest.NewServer(entratest.Config{
		Principals: []entratest.Principal{{
			ClientID: fairClient, Tenants: []string{fairTenant},
			Federated: []entratest.FederatedCredential{{Issuer: issuer.URL, Subject: entratest.Subject("shop", "cart"), Audience: defaultAudience}},
		}},
		UnknownResources: []string{"none"}, Issuers: map[string]*rsa.PublicKey{issuer.URL: issuer.Key()},
	})
	fake := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(latency)
		entra.ServeHTTP(w, r)
	}))
	t.Cleanup(fake.Close)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.Contains(r.URL.Path, "/namespaces/gone/") {
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","message":"serviceaccounts \"cart\" not found","reason":"NotFound","details":{"name":"cart","kind":"serviceaccounts"},"code":404}`))
			return
		}
		w.WriteHeader(http.StatusCreated)
		token := issuer.Token(entratest.Subject("shop", "cart"), defaultAudience, time.Now(), 10*time.Minute)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenRequest", "status": map[string]string{"token": token}})
	}))
	t.Cleanup(api.Close)
	tokens, err := newAccountTokens(&rest.Config{Host: api.URL}, federationConfig{audience: defaultAudience}, "node1",
		func(podresolver.ServiceAccount) []podresolver.BoundPod {
			return []podresolver.BoundPod{{Name: "a", UID: "a"}, {Name: "b", UID: "b"}, {Name: "c", UID: "c"}}
		})
	require.NoError(t, err)
	nowhere, err := net.Listen("tcp", "127.0.0.1:0") // as behind a firewall
	require.NoError(t, err)
	t.Cleanup(func() { _ = nowhere.Close() })
	roots := x509.NewCertPool()
	roots.AddCert(fake.Certificate())
	up := upstream.New(upstream.Config{
		IMDS: &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, Roots: roots, ServiceAccountToken: tokens.request,
		Authorities: []string{strings.TrimPrefix(fake.URL, "https://"), nowhere.Addr().String()},
	})
	t.Cleanup(up.Close)
	x := &exchanges{cache: tokencache.New(up.Token, tokencache.Config{}), authority: fake.URL, nowhere: "https://" + nowhere.Addr().String()}
	t.Cleanup(x.cache.Close)
	return x
}

const (
	fairClient = "fed00000-0000-4000-8000-000000000001"
	fairTenant = "7e9a9700-0000-4000-8000-00000000000a"
)

func fairKey(authority, namespace, uid, resource string) tokencache.Key {
	return tokencache.Key{ClientID: fairClient, Resource: resource, Principal: unique.Make(tokencache.Principal{
		TenantID: fairTenant, Authority: authority, ServiceAccount: tokencache.ServiceAccount{Namespace: namespace, Name: "cart", UID: uid},
	})}
}

// besides has pods of others request made-up resources while the one of a test asks, 20 at once each.
func (x *exchanges) besides(t *testing.T, pods int, authority, namespace string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	var serial atomic.Int64
	for pod := range pods {
		for range 20 {
			asking.Go(func() {
				for ctx.Err() == nil {
					key := fairKey(authority, namespace, "", fmt.Sprint(serial.Add(1)))
					if _, err := x.cache.Get(ctx, key, netip.AddrFrom4([4]byte{10, 1, 0, byte(pod)})); err != nil {
						time.Sleep(100 * time.Millisecond)
					}
				}
			})
		}
	}
	t.Cleanup(func() { stop(); asking.Wait() })
	time.Sleep(4 * time.Second)
}

// isServed checks that a pod with a single request at a time is served soon.
func (x *exchanges) isServed(t *testing.T) {
	t.Helper()
	for i := range 3 {
		began := time.Now()
		_, err := x.cache.Get(t.Context(), fairKey(x.authority, "shop", "", fmt.Sprint("own", i)), netip.MustParseAddr("10.2.0.1"))
		took := time.Since(began)
		t.Logf("after %s: %v", took.Round(time.Millisecond), err)
		require.NoError(t, err)
		assert.Less(t, took, 3*time.Second)
	}
}

// TestMissingServiceAccountsDelayNobody: requests for tokens of service accounts that have been deleted
// take turns with the others'.
func TestMissingServiceAccountsDelayNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 30 s")
	}
	x := newExchanges(t, 0)
	x.besides(t, 16, x.authority, "gone")
	x.isServed(t)
}

// TestUnreachableAuthorityDelaysNobody: who may write an AzureIdentity chooses among the authorities that
// are allowed, of which a node may not reach each.
func TestUnreachableAuthorityDelaysNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 30 s")
	}
	x := newExchanges(t, 0)
	x.besides(t, 4, x.nowhere, "shop")
	x.isServed(t)
}

// TestManyStartWithEntrasLatency: 250 pods with service accounts of their own are served within their
// wait, although Entra takes 0.35 s for a fetch.
func TestManyStartWithEntrasLatency(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 20 s")
	}
	x := newExchanges(t, 175*time.Millisecond)
	var asking sync.WaitGroup
	var served atomic.Int64
	for i := range 250 {
		asking.Go(func() {
			if _, err := x.cache.Get(t.Context(), fairKey(x.authority, "shop", fmt.Sprint(i), "https://vault"), netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})); err == nil {
				served.Add(1)
			}
		})
	}
	asking.Wait()
	assert.EqualValues(t, 250, served.Load())
}
