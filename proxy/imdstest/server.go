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
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
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
// identity, answers at once, gives 24-hour tokens of 1.6 KB, and has no limits.
type Config struct {
	Identities []Identity
	// Resources that Entra knows; a token for another is refused with AADSTS500011.
	// nil knows all.
	Resources []string
	Latency   time.Duration // before each token
	Lifetime  time.Duration // of a token; 0 means 24 hours
	TokenSize int           // bytes; 0 means 1600, about what Entra issues
	// Cached gives the same token until it expires, unless asked with
	// bypass_cache=true, as the real service does. Without it each is a new one.
	Cached bool
	// PerSecond and AtOnce are limits of token requests, above which the service
	// answers 429; 0 is no limit. The real ones are 20 and 5 for a virtual machine
	// (learn.microsoft.com, "Azure Instance Metadata Service", Rate limiting).
	PerSecond, AtOnce int
	// OnCall is told of every request, before its answer is sent. nil for nobody.
	OnCall func(Call) `json:"-"`
}

// Call is one request as it came in.
type Call struct {
	From    netip.Addr // the sender, as seen here
	Method  string
	Target  string // the request target, raw
	Path    string // the target's path, straightened
	Subject string // whose token was given; "" when none was
	Status  int    // of the answer; 0 when a fault was to give none
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
	issued int // tokens made since the start
	cache  map[claims]issued
	peak   peak
	faults []Fault
	// connections, by the client's address, and whether they are known still; see
	// ForgetConnections.
	connections map[string]bool
}

// NewServer returns a service that behaves as cfg says.
func NewServer(cfg Config) *Server {
	if cfg.Lifetime == 0 {
		cfg.Lifetime = 24 * time.Hour
	}
	if cfg.TokenSize == 0 {
		cfg.TokenSize = 1600
	}
	return &Server{cfg: cfg, cache: make(map[claims]issued), connections: make(map[string]bool)}
}

// Start serves on a free loopback port; the caller closes what it returns.
func (s *Server) Start() *httptest.Server {
	srv := httptest.NewUnstartedServer(s)
	srv.Listener, srv.Config.BaseContext = untilClosed(srv.Listener)
	srv.Start()
	return srv
}

// Serve serves on ln until the returned function is called.
func (s *Server) Serve(ln net.Listener) (stop func()) {
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second}
	ln, srv.BaseContext = untilClosed(ln)
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

// untilClosed returns a listener, and a context for all its requests that ends when
// it is closed: an httptest.Server waits for requests under way, some of which are
// never to be answered.
func untilClosed(ln net.Listener) (net.Listener, func(net.Listener) context.Context) {
	ctx, cancel := context.WithCancel(context.Background())
	return closing{ln, cancel}, func(net.Listener) context.Context { return ctx }
}

type closing struct {
	net.Listener
	before func()
}

func (c closing) Close() error {
	c.before()
	return c.Listener.Close()
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

// Peak is the most requests for tokens, refused ones included, that were here at
// once, and the most that came within one second, whichever second that was, since
// the start or Reset.
func (s *Server) Peak() (atOnce, perSecond int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peak.atOnce, s.peak.perSecond
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
	s.peak = peak{now: s.peak.now, atOnce: s.peak.now}
}

// ForgetConnections makes the service answer 421 on all connections that have been used
// so far, and close them, as Azure's GuestProxyAgent does once it has lost whose a
// connection is.
func (s *Server) ForgetConnections() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for from := range s.connections {
		s.connections[from] = false
	}
}

// knows reports whether a connection has not been forgotten.
func (s *Server) knows(from string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, seen := s.connections[from]
	if !seen && len(s.connections) < maxCalls {
		s.connections[from] = true
	}
	return known || !seen
}

func (s *Server) record(c Call) {
	if s.cfg.OnCall != nil {
		s.cfg.OnCall(c)
	}
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

// arrive counts a request for a token until leave is called, and reports whether it is
// within the limits.
func (s *Server) arrive() (leave func(), allowed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peak.arrive(time.Now())
	allowed = (s.cfg.PerSecond == 0 || len(s.peak.recent) <= s.cfg.PerSecond) && (s.cfg.AtOnce == 0 || s.peak.now <= s.cfg.AtOnce)
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.peak.now--
	}), allowed
}
