// Package proxy is the face that pods see: HTTP in, answers in the shape of
// Azure's instance metadata service (IMDS) out.
//
// The road of a request:
//
//  1. accept: connections that the kernel did not redirect are refused, see
//     OnlyRedirected.
//  2. route: the raw path is matched, exactly, against a short list; see route.
//  3. parse: the header check comes first and from memory, since SDKs probe
//     with a second's patience, then the query.
//  4. resolve: the source address becomes a pod. An excepted pod's requests go
//     to IMDS as they are.
//  5. decide: the pod's own list says which identity it may use. This happens
//     for every request, before the cache is looked at.
//  6. cache: the token comes from memory, or from upstream once for everybody.
//  7. respond: expires_in is computed anew; errors are JSON in IMDS's shape.
//
// This is the only package that knows HTTP status codes of answers to pods.
package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/tokencache"
)

// Config joins the rooms that the server needs. Pods, Tokens and Upstream are
// required.
type Config struct {
	Pods     *podresolver.Resolver
	Tokens   *tokencache.Cache
	Upstream http.RoundTripper // to IMDS, for what is passed on

	// MetadataHeaderOptional turns off the check for "Metadata: true". Without
	// it a pod that fetches URLs for others can be led to fetch tokens.
	MetadataHeaderOptional bool
	// BlockInstanceMetadata answers 403 to /metadata/instance.
	BlockInstanceMetadata bool

	Logger *slog.Logger // nil means slog.Default
}

// Server answers pods.
type Server struct {
	cfg     Config
	http    *http.Server
	forward *httputil.ReverseProxy
	log     *slog.Logger
	// refusals keeps pods that ask in a loop from filling the log: 20 lines at
	// once, 5 a second.
	refusals *rate.Limiter
}

const (
	readHeaderTimeout = 5 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 8 << 10
	// drainTimeout is how long Serve waits for requests under way when it is
	// told to stop; Kubernetes kills after 30 s by default.
	drainTimeout = 15 * time.Second
)

// New returns a server that is not listening yet.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger, refusals: rate.NewLimiter(5, 20)}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.forward = s.newForward()
	s.http = &http.Server{
		Handler:                      s,
		DisableGeneralOptionsHandler: true, // "OPTIONS *" takes the same road
		ReadHeaderTimeout:            readHeaderTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // what clients do wrong
	}
	return s
}

// Serve accepts from ln until ctx ends, then stops accepting, lets the requests
// under way finish for at most 15 s, and returns nil. It returns an error when ln
// fails before that. It closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(ln) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := s.http.Shutdown(drain); err != nil {
		s.log.Warn("cutting requests that did not finish in time", "error", err)
		_ = s.http.Close() // closing what Shutdown left; its error is the same
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// ServeHTTP takes a request down its road, and writes the error if one comes
// back. It is exported because http.Server asks for it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := s.handle(w, r); err != nil {
		s.refuse(w, r, err)
	}
}

func (s *Server) handle(w http.ResponseWriter, r *http.Request) error {
	switch kind := route(r.RequestURI); {
	case kind == routeToken:
		return s.token(w, r)
	case kind == routeOpen, kind == routeInstance && !s.cfg.BlockInstanceMetadata:
		switch {
		case r.Method != http.MethodGet:
			return s.exceptedOnly(w, r, errMethod)
		case r.ContentLength != 0 || r.Header["Upgrade"] != nil:
			// Nothing that is served here needs either, and both are ways to
			// say more to IMDS than the path does.
			return s.exceptedOnly(w, r, errNotPlain)
		}
		s.passOn(w, r, "path", r.URL.Path)
		return nil
	case kind == routeInstance:
		return s.exceptedOnly(w, r, errBlocked)
	default:
		return s.exceptedOnly(w, r, errNotFound)
	}
}

// exceptedOnly passes the request on if its pod is excepted, else returns refusal.
func (s *Server) exceptedOnly(w http.ResponseWriter, r *http.Request, refusal error) error {
	pod, err := s.resolve(r)
	if err != nil {
		return err
	}
	if pod.Exception() == "" {
		return refusal
	}
	s.passOn(w, r, "pod", pod, "exception", pod.Exception())
	return nil
}

// passOn sends a request to IMDS as it is; why says who or what is passed on.
func (s *Server) passOn(w http.ResponseWriter, r *http.Request, why ...any) {
	s.log.DebugContext(r.Context(), "passed on", append(why, "from", r.RemoteAddr, "method", r.Method)...)
	s.forward.ServeHTTP(w, r)
}

// resolve finds the pod that sent the request.
func (s *Server) resolve(r *http.Request) (*podresolver.Pod, error) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return nil, err // not a TCP connection: nobody is resolved
	}
	return s.cfg.Pods.Resolve(r.Context(), from.Addr().Unmap())
}
