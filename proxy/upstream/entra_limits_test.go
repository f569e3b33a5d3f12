package upstream

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"net"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unique"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/tokencache"
)

const (
	reachable   = "https://example.com" // which httptest has a certificate for
	unreachable = "https://unreachable.example"
	audience    = "api://AzureADTokenExchange"
	// secretClient is an application with a client secret.
	secretClient = "5ec7e700-0000-4000-8000-000000000001"
)

// exchanges is an Entra on connections in memory, so that a bubble's clock governs them, and an API
// server that has nothing in namespace gone.
type exchanges struct {
	*Upstream
	cache  *tokencache.Cache
	fake   *entratest.Server
	issuer *entratest.Issuer

	mu       sync.Mutex  // guards all following fields
	requests []time.Time // for Secrets and tokens of service accounts
	inFlight int
	peak     int
}

// newExchanges has the API server and Entra take as long as latency for each request, of which a fetch
// makes one and two.
func newExchanges(t *testing.T, latency time.Duration) (x *exchanges, stop func()) {
	t.Helper()
	x = &exchanges{issuer: entratest.NewIssuer("https://issuer.example")}
	x.fake = entratest.NewServer(entratest.Config{
		Principals: []entratest.Principal{{
			ClientID: clientID, Tenants: []string{tenant},
			Federated: []entratest.FederatedCredential{{Issuer: x.issuer.URL, Subject: entratest.Subject("shop", "cart"), Audience: audience}},
		}, {ClientID: secretClient, Tenants: []string{tenant}, Secret: clientSecret}},
		UnknownResources: []string{"none"}, Latency: latency, Issuers: map[string]*rsa.PublicKey{x.issuer.URL: x.issuer.Key()},
	})
	srv := httptest.NewUnstartedServer(x.fake)
	require.NoError(t, srv.Listener.Close())
	ln := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	srv.Listener = ln
	srv.StartTLS()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	x.Upstream = New(Config{
		IMDS: &url.URL{Scheme: "http", Host: "imds.test"}, Roots: roots, Authorities: []string{"example.com", "unreachable.example"},
		Secret: func(ctx context.Context, namespace, _ string) (map[string][]byte, error) {
			_, err := x.request(ctx, tokencache.ServiceAccount{Namespace: namespace}, latency)
			return map[string][]byte{"clientsecret": []byte(clientSecret)}, err
		},
		ServiceAccountToken: func(ctx context.Context, account tokencache.ServiceAccount) (string, error) {
			return x.request(ctx, account, latency)
		},
	})
	x.entra.transport.Proxy = nil
	x.entra.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if strings.HasPrefix(addr, "unreachable") { // as behind a firewall
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return ln.dial(ctx, network, addr)
	}
	x.cache = tokencache.New(x.Token, tokencache.Config{})
	return x, func() {
		x.cache.Close()
		x.Close()
		srv.Close()
	}
}

// request is Config.ServiceAccountToken, and what it and Config.Secret cost the API server.
func (x *exchanges) request(ctx context.Context, account tokencache.ServiceAccount, latency time.Duration) (string, error) {
	x.mu.Lock()
	x.requests = append(x.requests, time.Now())
	x.inFlight++
	x.peak = max(x.peak, x.inFlight)
	x.mu.Unlock()
	err := pause(ctx, latency)
	x.mu.Lock()
	defer x.mu.Unlock()
	x.inFlight--
	switch {
	case err != nil:
		return "", err
	case account.Namespace == "gone":
		return "", fmt.Errorf("%w: there is no such service account", ErrNoServiceAccountToken)
	}
	return x.issuer.Token(entratest.Subject("shop", "cart"), audience, time.Now(), 10*time.Minute), nil
}

// mostInASecond is how many tokens of service accounts have been requested in any second.
func (x *exchanges) mostInASecond() (most int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := range x.requests {
		n := 0
		for n < len(x.requests)-i && x.requests[i+n].Sub(x.requests[i]) < time.Second {
			n++
		}
		most = max(most, n)
	}
	return most
}

func exchangeKey(authority, namespace, uid, resource string) tokencache.Key {
	return tokencache.Key{ClientID: clientID, Resource: resource, Principal: unique.Make(tokencache.Principal{
		TenantID: tenant, Authority: authority, ServiceAccount: tokencache.ServiceAccount{Namespace: namespace, Name: "cart", UID: uid},
	})}
}

// TestFullNodeStartsByFederation: all pods of a full node start at once, with service accounts of their
// own, and all are served within their wait although Entra is not near.
func TestFullNodeStartsByFederation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, stop := newExchanges(t, 175*time.Millisecond)
		defer stop()
		began := time.Now()
		var pods sync.WaitGroup
		for i := range 250 {
			pods.Go(func() {
				_, err := x.cache.Get(t.Context(), exchangeKey(reachable, "shop", fmt.Sprint(i), "https://vault"), podAddr(i))
				assert.NoError(t, err, "pod %d after %s", i, time.Since(began))
			})
		}
		pods.Wait()
		t.Logf("all are served after %s", time.Since(began))
		assert.LessOrEqual(t, x.mostInASecond(), DefaultPerSecond)
		assert.Len(t, x.requests, 250)
		assert.Equal(t, 250, x.fake.Tokens(), "one exchange each")
	})
}

// TestUnreachableAuthorityDelaysNobody: who may write an AzureIdentity chooses among the authorities that
// are allowed, of which a node may not reach each.
func TestUnreachableAuthorityDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, stop := newExchanges(t, 0)
		defer stop()
		var others sync.WaitGroup
		defer others.Wait()
		for i := range 80 {
			others.Go(func() {
				_, err := x.cache.Get(t.Context(), exchangeKey(unreachable, "shop", "", fmt.Sprint(i)), podAddr(1000+i%4))
				assert.Error(t, err)
			})
		}
		synctest.Wait()
		assert.Positive(t, x.Stats().Entra.Waiting, "they wait for each other")
		began := time.Now()
		_, err := x.cache.Get(t.Context(), exchangeKey(reachable, "shop", "", "https://vault"), podAddr(0))
		require.NoError(t, err)
		assert.Zero(t, time.Since(began))
	})
}

func secretKey(namespace, resource string) tokencache.Key {
	return tokencache.Key{ClientID: secretClient, Resource: resource, Principal: unique.Make(tokencache.Principal{
		TenantID: tenant, Authority: reachable, SecretNamespace: namespace, SecretName: "sp",
	})}
}

// TestRequestsToAPIServerTakeTurns: pods whose service accounts or Secrets are gone have the API server
// asked no more often than others have, and delay these by one slot a round each.
func TestRequestsToAPIServerTakeTurns(t *testing.T) {
	for name, key := range map[string]func(namespace, resource string) tokencache.Key{
		"tokens of service accounts": func(namespace, resource string) tokencache.Key {
			return exchangeKey(reachable, namespace, "", resource)
		},
		"secrets": secretKey,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x, stop := newExchanges(t, 20*time.Millisecond)
				defer stop()
				const hostile = 16
				ctx, end := context.WithCancel(t.Context())
				var others sync.WaitGroup
				defer others.Wait()
				defer end()
				for i := range hostile * 20 {
					others.Go(func() {
						for n := 0; ctx.Err() == nil; n++ {
							_, err := x.cache.Get(ctx, key("gone", fmt.Sprint(i, " ", n)), podAddr(1000+i%hostile))
							assert.Error(t, err)
							_ = pause(ctx, 100*time.Millisecond)
						}
					})
				}
				time.Sleep(4 * time.Second)
				for i := range 3 {
					x.mu.Lock()
					before := len(x.requests)
					x.mu.Unlock()
					_, err := x.cache.Get(t.Context(), key("shop", fmt.Sprint(i)), podAddr(0))
					require.NoError(t, err)
					x.mu.Lock()
					assert.LessOrEqual(t, len(x.requests)-before, 3*hostile, "requests while this one waited")
					x.mu.Unlock()
				}
				assert.LessOrEqual(t, x.peak, DefaultPerSecond)
				assert.LessOrEqual(t, x.mostInASecond(), DefaultPerSecond)
			})
		})
	}
}
