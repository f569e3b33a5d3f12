package upstream

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"sync"
)

// TokenProxy is a proxy that exchanges service account tokens in Entra's place: that of AKS identity
// bindings, which lifts Entra's limit of 20 federated credentials for an identity
// (learn.microsoft.com, "Identity bindings for Azure Kubernetes Service"). All requests for a
// federated identity go there, with the path of Entra's URL after the proxy's own. azidentity
// has a client for it, which takes the service account's token from a file, and the place
// of the transport that keeps Entra's words: so this is another one.
type TokenProxy struct {
	URL        string // of https; "" for none
	ServerName string // for SNI, and that its certificate must have; "" means the URL's host
	CAFile     string // of PEM certificates, read again when it changes; "" means CAData
	CAData     string // the same in place of a file; "" means the system's
}

// ParseTokenProxy parses the URL of a TokenProxy.
func ParseTokenProxy(text string) (string, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil: // its text is the URL again
		return "", fmt.Errorf("%.200q is not a URL", text)
	case u.Scheme != "https":
		return "", fmt.Errorf("%.200q is not https", text)
	case u.Hostname() == "" || u.User != nil || u.ForceQuery || u.RawQuery != "" || u.Fragment != "":
		return "", fmt.Errorf("%.200q: want https://<host>[:port][/<path>], no query", text)
	}
	return text, nil
}

// tokenProxy sends requests to a TokenProxy.
type tokenProxy struct {
	cfg  TokenProxy
	base *url.URL

	mu        sync.Mutex // guards all following fields
	ca        []byte     // what transport trusts; nil for the system's
	transport *http.Transport
}

// newTokenProxy returns nil without a URL.
func newTokenProxy(cfg TokenProxy) *tokenProxy {
	if cfg.URL == "" {
		return nil
	}
	base, err := url.Parse(cfg.URL)
	if err != nil { // see ParseTokenProxy
		panic(err)
	}
	return &tokenProxy{cfg: cfg, base: base}
}

// RoundTrip sends a request for Entra to the proxy.
func (p *tokenProxy) RoundTrip(r *http.Request) (*http.Response, error) {
	transport, err := p.current()
	if err != nil {
		return nil, fmt.Errorf("token proxy: %w", err)
	}
	r = r.Clone(r.Context()) // with Entra's name in its header Host
	query := r.URL.RawQuery
	r.URL = p.base.JoinPath(r.URL.EscapedPath())
	r.URL.RawQuery = query
	return transport.RoundTrip(r)
}

// current returns a transport that trusts what the file has now.
func (p *tokenProxy) current() (*http.Transport, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ca := []byte(p.cfg.CAData)
	if p.cfg.CAFile != "" {
		var err error
		if ca, err = os.ReadFile(p.cfg.CAFile); err != nil {
			return nil, err
		}
	}
	if p.transport != nil && (bytes.Equal(ca, p.ca) || len(ca) == 0) { // it may be empty while it is written
		return p.transport, nil
	}
	var roots *x509.CertPool
	if p.cfg.CAFile != "" || p.cfg.CAData != "" {
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(ca) {
			return nil, errors.New("its CA has no PEM certificate")
		}
	}
	if p.transport != nil {
		p.transport.CloseIdleConnections()
	}
	p.ca = ca
	p.transport = newEntraTransport(&tls.Config{MinVersion: tls.VersionTLS12, ServerName: p.cfg.ServerName, RootCAs: roots})
	p.transport.Proxy = nil // it is in the cluster
	return p.transport, nil
}

// maxProxyMessage bounds what is kept of a TokenProxy's own words, in characters.
const maxProxyMessage = 200

// explainTokenProxy makes a refusal of the TokenProxy's own, which is not Entra's JSON, one that a
// retry does not change. It refuses in the cluster's words (kind: Status) a service account without
// the right use-managed-identity. The codes are those of RFC 6749, section 5.2.
func (e *Error) explainTokenProxy(body []byte) {
	switch e.Status {
	case http.StatusUnauthorized:
		e.Code = "invalid_client"
	case http.StatusForbidden:
		e.Code = "unauthorized_client"
	default:
		return
	}
	var status struct {
		Message string `json:"message"`
	}
	_ = json.Unmarshal(body, &status) // what is not JSON has no message
	e.empty = false
	e.Description = fmt.Sprintf("the cluster's token proxy refused: %.*s", maxProxyMessage, cmp.Or(status.Message, http.StatusText(e.Status)))
}

func (p *tokenProxy) close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.transport != nil {
		p.transport.CloseIdleConnections()
	}
}
