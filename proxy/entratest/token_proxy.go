package entratest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"sync"
	"time"
)

// TokenProxy is a stand-in for the token proxy of AKS identity bindings: it serves below a path of its
// own, to clients that name it by SNI, with a certificate of its own authority. The principals'
// federated credentials stand for the identity bindings.
type TokenProxy struct {
	*httptest.Server
	URL string // of the path that it serves below
	CA  []byte // PEM

	mu        sync.Mutex      // guards all below
	requests  []string        // method and path
	forbidden map[string]bool // client IDs
}

// StartTokenProxy starts a TokenProxy with a name in front of the server; the caller closes it. It
// panics if it cannot.
func (s *Server) StartTokenProxy(name string) *TokenProxy {
	const path = "/identity-binding"
	p := &TokenProxy{forbidden: make(map[string]bool)}
	p.Server = httptest.NewUnstartedServer(http.StripPrefix(path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client := r.PostFormValue("client_id")
		p.mu.Lock()
		p.requests = append(p.requests, r.Method+" "+r.URL.Path)
		forbidden := p.forbidden[client]
		p.mu.Unlock()
		if forbidden {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403,"message":"cannot use-managed-identity resource \"%s\" in API group \"cid.wi.aks.azure.com\""}`, client)
			return
		}
		s.ServeHTTP(w, r)
	})))
	certificate, ca := certificateFor(name)
	p.CA = ca
	p.TLS = &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if hello.ServerName != name {
				return nil, fmt.Errorf("no certificate for %q", hello.ServerName)
			}
			return certificate, nil
		},
		Certificates: []tls.Certificate{*certificate}, // or httptest uses its own
	}
	p.StartTLS()
	p.TLS.Certificates = nil
	p.URL = p.Server.URL + path
	return p
}

// Forbid refuses an identity to all service accounts, as to those without the right
// use-managed-identity.
func (p *TokenProxy) Forbid(clientID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forbidden[clientID] = true
}

// Requests returns the requests so far, as "GET /path".
func (p *TokenProxy) Requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.requests...)
}

// certificateFor returns a certificate for a name, and that of the authority that signed it.
func certificateFor(name string) (certificate *tls.Certificate, ca []byte) {
	now := time.Now()
	sign := func(template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) []byte {
		template.NotBefore, template.NotAfter = now.Add(-time.Hour), now.Add(24*time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
		if err != nil {
			panic(err)
		}
		return der
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		return key
	}
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "entratest"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	authorityKey, key := newKey(), newKey()
	root := sign(authority, authority, authorityKey, authorityKey)
	leaf := sign(&x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}}, authority, key, authorityKey)
	return &tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root})
}
