package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

const (
	tenantID   = "7e9a9700-0000-4000-8000-000000000001"
	ledgerID   = "1ed9e400-1d00-4000-8000-000000000002" // in pods.yaml
	clusterURL = "https://oidc.example/demo-cluster"
	audience   = "api://AzureADTokenExchange"
)

// entra is a stand-in for Microsoft Entra, in which the identity of pod ledger has a federated
// credential, and for the API server that issues the token of the pod's service account.
type entra struct {
	*entratest.Server
	issuer *entratest.Issuer
	https  *httptest.Server
}

// startEntra starts the stand-in on the node's loopback.
func startEntra() *entra {
	e := &entra{issuer: entratest.NewIssuer(clusterURL)}
	e.Server = entratest.NewServer(entratest.Config{
		Principals: []entratest.Principal{{ClientID: ledgerID, Tenants: []string{tenantID}, Federated: []entratest.FederatedCredential{
			{Issuer: clusterURL, Subject: entratest.Subject("shop", "ledger"), Audience: audience},
		}}},
		Resources: []string{resource},
		Issuers:   map[string]*rsa.PublicKey{clusterURL: e.issuer.Key()},
	})
	e.https = e.Start()
	return e
}

// federation is for podresolver.
func (e *entra) federation() podresolver.Federation {
	return podresolver.Federation{ServiceAccounts: true, TenantID: tenantID, Authority: e.https.URL}
}

// trust adds to an upstream what it needs to exchange tokens here.
func (e *entra) trust(cfg *upstream.Config) {
	cfg.Authorities = []string{strings.TrimPrefix(e.https.URL, "https://")}
	cfg.Roots = x509.NewCertPool()
	cfg.Roots.AddCert(e.https.Certificate())
	cfg.ServiceAccountToken = func(_ context.Context, account tokencache.ServiceAccount) (string, error) {
		return e.issuer.Token(entratest.Subject(account.Namespace, account.Name), audience, time.Now(), 10*time.Minute), nil
	}
}
