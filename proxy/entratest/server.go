// Package entratest is a stand-in for Entra's token endpoint, for tests.
//
// A request for a token is counted, meets an injected fault if one is due, and has
// its tenant, application, proof (client secret, an assertion signed with the
// certificate's key, or a service account's token) and scope checked, in this order; what is wrong is told by the
// AADSTS number that Entra gives it. Tokens are those of imdstest: its Subject says
// whose they are, and Tenant of which tenant. Nothing in them is secret.
package entratest

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// Principal is a service principal, which a managed identity has, too, in each of its tenants. It
// proves itself with its secret, its certificate or tokens of others, whichever it has.
type Principal struct {
	ClientID    string
	Tenants     []string
	Secret      string
	Certificate *x509.Certificate
	Federated   []FederatedCredential
}

// Config says how Entra behaves. The zero value knows nobody, and gives tokens of
// an hour.
type Config struct {
	Principals []Principal
	// Resources that there are. A slash at the end counts.
	Resources []string
	// UnknownResources, if there are any, are the only ones that there are not.
	UnknownResources []string
	Lifetime         time.Duration // of a token; 0 means an hour
	Latency          time.Duration // of each answer
	// Issuers are the keys of those that federated credentials name, by URL.
	Issuers map[string]*rsa.PublicKey
}

// Fault replaces the answer to one request for a token.
type Fault struct {
	Status     int
	Body       string
	RetryAfter string // header; "" for none
}

// Call is one request as it came in.
type Call struct {
	Path      string
	UserAgent string
	Scope     string // asked for; "" in a request that is not for a token
	Subject   string // whose token was given; "" when none was
}

// Server is the fake. It is an http.Handler, safe for concurrent use.
type Server struct {
	mu     sync.Mutex // guards all below
	cfg    Config
	calls  []Call
	tokens int
	faults []Fault
}

// NewServer returns an Entra that behaves as cfg says.
func NewServer(cfg Config) *Server {
	if cfg.Lifetime == 0 {
		cfg.Lifetime = time.Hour
	}
	return &Server{cfg: cfg}
}

// Start serves HTTPS on a free loopback port; the caller closes what it returns,
// whose URL is the authority, and whose Certificate signed itself.
func (s *Server) Start() *httptest.Server { return httptest.NewTLSServer(s) }

// SetSecret changes the secret of an application.
func (s *Server) SetSecret(clientID, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.cfg.Principals {
		if strings.EqualFold(s.cfg.Principals[i].ClientID, clientID) {
			s.cfg.Principals[i].Secret = secret
		}
	}
}

// SetFederated changes the federated credentials of an application.
func (s *Server) SetFederated(clientID string, credentials ...FederatedCredential) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.cfg.Principals {
		if strings.EqualFold(s.cfg.Principals[i].ClientID, clientID) {
			s.cfg.Principals[i].Federated = credentials
		}
	}
}

// Inject queues faults; each is the answer to one request for a token.
func (s *Server) Inject(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, faults...)
}

// Tokens is how many tokens have been given.
func (s *Server) Tokens() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tokens
}

// Calls returns all requests so far.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Tenant says of which tenant a token is. It returns "" for what is not a token of
// this package.
func Tenant(token string) string {
	head, _, ok := strings.Cut(token, ".")
	if !ok {
		return ""
	}
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var claims claims
	if json.Unmarshal(raw, &claims) != nil {
		return ""
	}
	return claims.Tenant
}

type claims struct {
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	Serial   int    `json:"serial"`
	Tenant   string `json:"tid"`
}

// ServeHTTP answers as Entra would.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Latency > 0 {
		select {
		case <-time.After(s.cfg.Latency):
		case <-r.Context().Done():
			return
		}
	}
	call := Call{Path: r.URL.Path, UserAgent: r.UserAgent()}
	status, body := http.StatusNotFound, any(map[string]string{"error": "not found"})
	tenant, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case r.Method == http.MethodGet && rest == "v2.0/.well-known/openid-configuration":
		status, body = s.configuration(r, tenant)
	case r.Method == http.MethodPost && rest == "oauth2/v2.0/token":
		if f, ok := s.nextFault(); ok {
			if f.RetryAfter != "" {
				w.Header().Set("Retry-After", f.RetryAfter)
			}
			s.record(call)
			w.WriteHeader(f.Status)
			_, _ = w.Write([]byte(f.Body))
			return
		}
		status, body = s.token(r, tenant, &call)
	}
	s.record(call)
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func (s *Server) record(c Call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, c)
	if c.Subject != "" {
		s.tokens++
	}
}

func (s *Server) nextFault() (Fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.faults) == 0 {
		return Fault{}, false
	}
	f := s.faults[0]
	s.faults = s.faults[1:]
	return f, true
}

// configuration is where a client learns where to get tokens (OpenID Connect
// Discovery 1.0, section 4).
func (s *Server) configuration(r *http.Request, tenant string) (int, any) {
	if !s.hasTenant(tenant) {
		return refuse(http.StatusBadRequest, "invalid_tenant", 90002, "Tenant '"+tenant+"' not found.")
	}
	base := "https://" + r.Host + "/" + tenant
	return http.StatusOK, map[string]string{
		"issuer":                 base + "/v2.0",
		"token_endpoint":         base + "/oauth2/v2.0/token",
		"authorization_endpoint": base + "/oauth2/v2.0/authorize",
	}
}

func (s *Server) hasTenant(tenant string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.cfg.Principals, func(p Principal) bool { return slices.Contains(p.Tenants, tenant) })
}

// refuse is an error as Entra writes it (learn.microsoft.com, "Microsoft Entra
// authentication and authorization error codes").
func refuse(status int, code string, number int, text string) (int, any) {
	return status, map[string]any{
		"error": code, "error_codes": []int{number}, "trace_id": "trace",
		"error_description": fmt.Sprintf("AADSTS%d: %s\r\nTrace ID: trace\r\nCorrelation ID: correlation", number, text),
	}
}

func (s *Server) token(r *http.Request, tenant string, call *Call) (int, any) {
	if r.ParseForm() != nil || r.PostForm.Get("grant_type") != "client_credentials" {
		return refuse(http.StatusBadRequest, "unsupported_grant_type", 70003, "The grant type is not supported.")
	}
	form := r.PostForm
	call.Scope = form.Get("scope")
	if !s.hasTenant(tenant) {
		return refuse(http.StatusBadRequest, "invalid_tenant", 90002, "Tenant '"+tenant+"' not found.")
	}
	p, ok := s.principal(form.Get("client_id"), tenant)
	if !ok {
		return refuse(http.StatusBadRequest, "unauthorized_client", 700016, "Application '"+form.Get("client_id")+"' was not found in the directory '"+tenant+"'.")
	}
	if status, body := s.checkProof(p, form, "https://"+r.Host+r.URL.Path); status != 0 {
		return status, body
	}
	scope, _, _ := strings.Cut(call.Scope, " ") // clients add openid and the like
	resource, ok := strings.CutSuffix(scope, "/.default")
	switch {
	case !ok:
		return refuse(http.StatusBadRequest, "invalid_scope", 70011, "The scope '"+call.Scope+"' is not valid.")
	case slices.Contains(s.cfg.UnknownResources, resource), len(s.cfg.UnknownResources) == 0 && !slices.Contains(s.cfg.Resources, resource):
		return refuse(http.StatusBadRequest, "invalid_resource", 500011, "The resource principal named "+resource+" was not found in the tenant named "+tenant+".")
	}
	call.Subject = p.ClientID
	s.mu.Lock()
	serial := s.tokens + 1
	s.mu.Unlock()
	head, err := json.Marshal(claims{Subject: p.ClientID, Audience: resource, Serial: serial, Tenant: tenant})
	if err != nil {
		panic(err) // four plain fields
	}
	seconds := int(s.cfg.Lifetime / time.Second)
	return http.StatusOK, map[string]any{
		"token_type": "Bearer", "expires_in": seconds, "ext_expires_in": 2 * seconds, "refresh_in": seconds / 2,
		"access_token": base64.RawURLEncoding.EncodeToString(head) + ".0",
	}
}

func (s *Server) principal(clientID, tenant string) (Principal, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.cfg.Principals {
		if strings.EqualFold(p.ClientID, clientID) && slices.Contains(p.Tenants, tenant) {
			return p, true
		}
	}
	return Principal{}, false
}

// checkProof returns status 0 if a request proves to come from the principal.
func (s *Server) checkProof(p Principal, form url.Values, endpoint string) (status int, body any) {
	switch assertion := form.Get("client_assertion"); {
	case assertion != "" && p.Certificate == nil && p.Secret == "":
		if number, text := s.checkFederated(p, assertion, form.Get("client_assertion_type")); number != 0 {
			return refuse(http.StatusUnauthorized, "invalid_client", number, text)
		}
	case assertion != "":
		if why := checkAssertion(p, assertion, form.Get("client_assertion_type"), endpoint); why != "" {
			return refuse(http.StatusUnauthorized, "invalid_client", 700027, "The client assertion is not valid: "+why+".")
		}
	case form.Get("client_secret") == "":
		return refuse(http.StatusUnauthorized, "invalid_client", 7000216, "A client assertion or client secret is required.")
	case p.Secret == "" || form.Get("client_secret") != p.Secret:
		return refuse(http.StatusUnauthorized, "invalid_client", 7000215, "Invalid client secret provided.")
	}
	return 0, nil
}
