// Package imdstest is a stand-in for Azure's instance metadata service, for
// tests, the demo and benchmarks.
//
// A request is counted with its sender, has its path read as forgivingly as the
// real service reads it (case, backslashes, doubled slashes, percent-encoding
// and dots are all straightened), waits for the configured latency, meets an
// injected fault if one is due, and gets the bodies that the real service was
// seen to send. Tokens say whose they are, see Subject. Nothing in them is
// secret.
package imdstest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Node is the subject of tokens given to callers that name no identity: on a
// real virtual machine that is the machine's own identity.
const Node = "the node itself"

// Identity is a user-assigned managed identity that the machine carries.
type Identity struct {
	ClientID   string
	ObjectID   string
	ResourceID string
}

// Config says how the service behaves. The zero value knows no user-assigned
// identity, answers at once, and gives 24-hour tokens of 1.6 KB.
type Config struct {
	Identities []Identity
	Latency    time.Duration // before each token
	Lifetime   time.Duration // of a token; 0 means 24 hours
	TokenSize  int           // bytes; 0 means 1600, about what Entra issues
}

// Call is one request as it came in.
type Call struct {
	From    netip.Addr // the sender, as seen here
	Method  string
	Target  string // the request target, raw
	Path    string // the target's path, straightened
	Subject string // whose token was given; "" when none was
	Status  int
}

// Fault replaces the answer to one token request.
type Fault struct {
	Status     int
	Body       string
	RetryAfter string        // header; "" for none
	Delay      time.Duration // before the answer
}

// maxCalls bounds the list of remembered calls; the counters go on.
const maxCalls = 4096

// Server is the fake service. It is an http.Handler, safe for concurrent use.
type Server struct {
	cfg Config

	mu     sync.Mutex // guards all below
	calls  []Call
	tokens int
	total  int
	faults []Fault
}

// NewServer returns a service that behaves as cfg says.
func NewServer(cfg Config) *Server {
	if cfg.Lifetime == 0 {
		cfg.Lifetime = 24 * time.Hour
	}
	if cfg.TokenSize == 0 {
		cfg.TokenSize = 1600
	}
	return &Server{cfg: cfg}
}

// Start serves on a free loopback port; the caller closes what it returns.
func (s *Server) Start() *httptest.Server { return httptest.NewServer(s) }

// Serve serves on ln until the returned function is called.
func (s *Server) Serve(ln net.Listener) (stop func()) {
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(ln) // always returns a non-nil error, after Close
	}()
	return func() {
		_ = srv.Close()
		<-done
	}
}

// SetLatency changes Config.Latency for the requests to come.
func (s *Server) SetLatency(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cfg.Latency = d
}

func (s *Server) latency() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Latency
}

// Inject queues faults; each is the answer to one token request.
func (s *Server) Inject(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, faults...)
}

// Tokens is how many tokens have been given since the start or Reset.
func (s *Server) Tokens() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tokens
}

// Requests is how many requests of any kind came since the start or Reset.
func (s *Server) Requests() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// Calls returns the requests since the start or Reset, at most the first 4096.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Reset forgets all calls and all faults not yet met.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.tokens, s.total, s.faults = nil, 0, 0, nil
}

// Subject says whose token this is: the client ID of an identity, or Node. It
// returns "" for what is not a token of this package.
func Subject(token string) string {
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
	return claims.Subject
}

type claims struct {
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	Serial   int    `json:"serial"`
}

// ServeHTTP answers as the real service would.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	call := Call{Method: r.Method, Target: r.RequestURI, Path: Straighten(r.RequestURI)}
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		call.From = from.Addr().Unmap()
	}
	a := s.answer(r, &call)
	call.Status = a.status
	s.record(call)
	for name, value := range a.header {
		w.Header().Set(name, value)
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	w.WriteHeader(a.status)
	_, _ = w.Write([]byte(a.body))
}

func (s *Server) record(c Call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total++
	if c.Subject != "" {
		s.tokens++
	}
	if len(s.calls) < maxCalls {
		s.calls = append(s.calls, c)
	}
}

type answer struct {
	status int
	body   string
	header map[string]string
}

// refuse is an error in the shape of the identity endpoint.
func refuse(description string) answer {
	return answer{status: http.StatusBadRequest, body: fmt.Sprintf(`{"error":"invalid_request","error_description":%q}`, description)}
}

var notFound = answer{status: http.StatusNotFound, body: `{"error":"Not Found"}`}

func (s *Server) answer(r *http.Request, call *Call) answer {
	headers := r.Header.Get("Metadata") == "true"
	query := r.URL.Query()
	switch p := call.Path; {
	case p == "/metadata/identity/oauth2/token":
		return s.token(r, query, call)
	case p == "/metadata/identity/getplatformmetadata" && !headers:
		return refuse("Required metadata header not specified")
	case strings.HasPrefix(p, "/metadata/identity") && p != "/metadata/identity/info" && p != "/metadata/identity/issuecredential":
		return notFound
	case p == "/metadata/versions":
		return answer{status: 200, body: `{"apiVersions":["2018-02-01","2021-02-01"]}`}
	case !headers:
		return answer{status: 400, body: `{ "error": "Bad request: . Required metadata header not specified" }`}
	case query.Get("api-version") == "":
		return answer{status: 400, body: `{"error":"Bad request. api-version was not specified in the request. For more information refer to aka.ms/azureimds","newest-versions":["2021-02-01","2020-12-01","2020-10-01"]}`}
	case p == "/metadata/instance" || strings.HasPrefix(p, "/metadata/instance/"):
		return answer{status: 200, body: `{"compute":{"azEnvironment":"AzurePublicCloud","name":"node1"}}`}
	case p == "/metadata/loadbalancer":
		return answer{status: 200, body: `{"loadbalancer":{}}`}
	case p == "/metadata/scheduledevents":
		return answer{status: 200, body: `{"DocumentIncarnation":1,"Events":[]}`}
	case p == "/metadata/attested/document":
		return answer{status: 200, body: `{"encoding":"pkcs7","signature":"the node's own signature"}`}
	case p == "/metadata/identity/info":
		return answer{status: 200, body: `{"tenantId":"the node's own tenant"}`}
	case p == "/metadata/identity/issuecredential":
		return answer{status: 200, body: `{"certificate":"the node's own certificate"}`}
	default:
		return notFound
	}
}

func (s *Server) token(r *http.Request, query url.Values, call *Call) answer {
	if r.Header.Get("Metadata") != "true" {
		return refuse("Required metadata header not specified")
	}
	if r.Header.Get("X-Forwarded-For") != "" {
		return refuse("X-Forwarded-For header is not allowed")
	}
	if r.Method != http.MethodGet {
		return answer{status: 405, body: `{"error":"Method Not Allowed"}`}
	}
	if f, ok := s.nextFault(); ok {
		time.Sleep(f.Delay)
		a := answer{status: f.Status, body: f.Body}
		if f.RetryAfter != "" {
			a.header = map[string]string{"Retry-After": f.RetryAfter}
		}
		return a
	}
	for _, required := range []string{"api-version", "resource"} {
		if query.Get(required) == "" {
			return refuse(fmt.Sprintf("Required query variable '%s' is missing", required))
		}
	}
	subject, ok := s.subject(query)
	if !ok {
		return refuse("Identity not found")
	}
	time.Sleep(s.latency())
	call.Subject = subject
	return answer{status: 200, body: s.tokenBody(subject, query.Get("resource"))}
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

// subject finds the identity that the query names; none named is the node's.
func (s *Server) subject(query url.Values) (string, bool) {
	client, object := query.Get("client_id"), query.Get("object_id")
	resource := query.Get("msi_res_id")
	if resource == "" {
		resource = query.Get("mi_res_id")
	}
	if client == "" && object == "" && resource == "" {
		return Node, true
	}
	for _, id := range s.cfg.Identities {
		if (client == "" || strings.EqualFold(client, id.ClientID)) &&
			(object == "" || strings.EqualFold(object, id.ObjectID)) &&
			(resource == "" || strings.EqualFold(resource, id.ResourceID)) {
			return id.ClientID, true
		}
	}
	return "", false
}

func (s *Server) tokenBody(subject, resource string) string {
	s.mu.Lock()
	serial := s.tokens + 1
	s.mu.Unlock()
	head, err := json.Marshal(claims{Subject: subject, Audience: resource, Serial: serial})
	if err != nil {
		panic(err) // three plain fields
	}
	token := base64.RawURLEncoding.EncodeToString(head) + "."
	if pad := s.cfg.TokenSize - len(token); pad > 0 {
		token += strings.Repeat("0", pad)
	}
	now := time.Now().Unix()
	life := int64(s.cfg.Lifetime / time.Second)
	body, err := json.Marshal(map[string]string{ // a map's keys are written in order
		"access_token":   token,
		"client_id":      subject,
		"expires_in":     strconv.FormatInt(life, 10),
		"expires_on":     strconv.FormatInt(now+life, 10),
		"ext_expires_in": strconv.FormatInt(life, 10),
		"not_before":     strconv.FormatInt(now, 10),
		"resource":       resource,
		"token_type":     "Bearer",
	})
	if err != nil {
		panic(err)
	}
	return string(body)
}

// Straighten reads the path of a request target as the real service does:
// whatever spelling leads there, this is where it leads.
func Straighten(target string) string {
	if u, err := url.Parse(target); err == nil && u.Host != "" && u.Scheme != "" {
		target = u.RequestURI()
	}
	p, _, _ := strings.Cut(target, "?")
	for range 3 { // encoded, and encoded again
		decoded, err := url.PathUnescape(p)
		if err != nil {
			break
		}
		p = decoded
	}
	p = strings.ToLower(strings.ReplaceAll(p, `\`, "/"))
	segments := strings.Split(p, "/")
	for i, segment := range segments {
		segments[i], _, _ = strings.Cut(segment, ";")
	}
	return path.Clean("/" + strings.Join(segments, "/"))
}
