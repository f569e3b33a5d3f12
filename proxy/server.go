// Package proxy is the face that pods see: HTTP in, answers in the shape of
// Azure's instance metadata service (IMDS) out.
//
// The road of a request:
//
//  1. accept: connections that the kernel did not redirect are refused, and others
//     bounded, see package listener.
//  2. route: the raw path is matched, exactly, against a short list; see route.
//  3. parse: the header check comes first and from memory, since SDKs probe
//     with a second's patience, then the query.
//  4. resolve: the source address becomes a pod, where the node's network makes
//     sure that the address is the pod's own. An excepted pod's requests go to
//     IMDS as they are.
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
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// Defaults of a Config that leaves them out.
const (
	// DefaultMaxConnections is two for each of 250 pods.
	DefaultMaxConnections       = 512
	DefaultMaxConnectionsPerPod = 64
)

// Config joins the rooms that the server needs. Pods, Tokens and Upstream are
// required.
type Config struct {
	Pods     *podresolver.Resolver
	Tokens   *tokencache.Cache
	Upstream http.RoundTripper // to IMDS, for what is passed through

	// MetadataHeaderOptional turns off the check for "Metadata: true". Without
	// it a pod that fetches URLs for others can be led to fetch tokens. Clients of App
	// Service, who do not send that header, may then use that service's names of IDs, too.
	MetadataHeaderOptional bool
	// BlockInstanceMetadata answers 403 to /metadata/instance, except to excepted pods and
	// to those of InstanceMetadataNamespaces.
	BlockInstanceMetadata      bool
	InstanceMetadataNamespaces []string
	// Allow lists those of AllowablePaths that pods may have; none by default.
	Allow []string
	// PodsOnly answers nothing but to pods of this node. Without it what every
	// pod may have is given to whoever comes, which is for listener.OnlyRedirected
	// alone to limit to pods.
	PodsOnly bool
	// CheckSource returns an error if a connection from this address, which came in over
	// the interface of this index (0 if that is not known), may be another pod's than
	// this one's, which the API server names for the address. Nothing is then served that
	// depends on who is calling. One that wraps podresolver.ErrUnconfirmed may be mended
	// by news, which are waited for. nil trusts all addresses.
	CheckSource func(addr netip.Addr, ingress int, pod *podresolver.Pod) error

	// HostTokenUIDs are the users of this node whose processes may ask for tokens of
	// pods that they name, at /host/token over loopback. None turns it off.
	HostTokenUIDs []uint32

	// MaxConnections and MaxConnectionsPerPod bound the open connections, in all and
	// from one address; 0 means DefaultMaxConnections and DefaultMaxConnectionsPerPod.
	MaxConnections, MaxConnectionsPerPod int

	Logger *slog.Logger // nil means slog.Default
}

// Server answers pods.
type Server struct {
	cfg          Config
	http         *http.Server
	reverseProxy *httputil.ReverseProxy
	log          *slog.Logger
	draining     atomic.Bool // see SetDraining

	refusals refusals
	conns    *listener.Limiter
}

const (
	readHeaderTimeout = 5 * time.Second
	// readTimeout bounds a request with its body, whether anybody wants that or not:
	// http.Server looks for its end even after the answer. What waits for its answer
	// after that is not bounded by it.
	readTimeout = 30 * time.Second
	idleTimeout = 2 * time.Minute
	// maxHeaderBytes makes it 8 KiB: http.Server adds another 4 (initialReadLimitSize).
	maxHeaderBytes = 8<<10 - 4096
	// lingerTimeout is how long Serve waits for clients to use their connections
	// once more.
	lingerTimeout = time.Second
	// drainTimeout is how long Serve waits for requests under way when it is
	// told to stop; Kubernetes kills after 30 s by default.
	drainTimeout = 15 * time.Second
)

// New returns a server that is not listening yet.
func New(cfg Config) *Server {
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = DefaultMaxConnections
	}
	if cfg.MaxConnectionsPerPod <= 0 {
		cfg.MaxConnectionsPerPod = DefaultMaxConnectionsPerPod
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger, refusals: newRefusals(),
		conns: listener.NewLimiter(cfg.MaxConnections, cfg.MaxConnectionsPerPod),
	}
	s.reverseProxy = s.newReverseProxy()
	s.http = &http.Server{
		Handler:                      s,
		ConnContext:                  s.conns.ConnContext,
		DisableGeneralOptionsHandler: true, // "OPTIONS *" takes the same road
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // what clients do wrong
	}
	return s
}

// Serve accepts from ln until ctx ends, then stops accepting, lets the requests
// under way finish for at most 15 s, and returns nil. It returns an error when ln
// fails before that. It closes ln. It fixes the size of the kernel's buffers of what ln
// accepts.
//
// When ctx ends it first gives clients a second to use the connections that they
// hold once more, and so to learn that they are at an end: a request that is on its
// way to an idle connection just when that is closed is lost (RFC 9112, 9.6), and
// so is one that http.Server reads after Shutdown.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	var open sync.WaitGroup // connections
	s.http.ConnState = func(c net.Conn, state http.ConnState) {
		s.conns.ConnState(c, state)
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed, http.StateHijacked:
			open.Done()
		}
	}
	if err := listener.FixBuffers(ln); err != nil {
		s.log.Warn("the size of the sockets' buffers cannot be fixed: connections may take more memory than the limits say", "error", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.http.Serve(s.conns.Listener(ln)) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	s.SetDraining(true)
	s.conns.Drain()
	_ = ln.Close()
	<-ended //nolint:errcheck // what Close did to it is not news
	allClosed := make(chan struct{})
	go func() { open.Wait(); close(allClosed) }()
	select {
	case <-allClosed:
	case <-time.After(lingerTimeout):
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := s.http.Shutdown(drain); err != nil {
		s.log.Warn("cutting requests that did not finish in time", "error", err)
		_ = s.http.Close() // closing what Shutdown left; its error is the same
	}
	return nil
}

// Connections returns what has been counted of connections so far.
func (s *Server) Connections() listener.Stats { return s.conns.Stats() }

// SetDraining makes the server close each connection with its next response, so that
// clients connect again and reach another server that accepts from the same socket; or,
// with false, keep connections open again.
func (s *Server) SetDraining(draining bool) { s.draining.Store(draining) }

// ServeHTTP takes a request down its road, and writes the error if one comes
// back. It is exported because http.Server asks for it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w = &response{
		ResponseWriter: w, draining: &s.draining,
		// Where a request ends may be in doubt: Content-Length beside Transfer-Encoding, and
		// Transfer-Encoding in HTTP/1.0, must end the connection (RFC 9112, 6.1), and
		// http.Server hides both. So whatever has a body ends it, and all of HTTP/1.0.
		last: r.ContentLength != 0 || !r.ProtoAtLeast(1, 1),
	}
	if err := s.handle(w, r); err != nil {
		s.refuse(w, r, err)
	}
}

func (s *Server) handle(w http.ResponseWriter, r *http.Request) error {
	if r.Method == http.MethodConnect || r.ProtoMajor != 1 {
		// For nobody: an IMDS that understood a tunnel (RFC 9110, 9.3.6) or a preface of
		// HTTP/2 would take what other pods send on that connection for what is in it.
		return errMethod
	}
	if conn := listener.FromContext(r.Context()); conn.Loopback() {
		return s.host(w, r, conn)
	}
	switch kind := route(r.RequestURI); {
	case kind == routeToken:
		return s.token(w, r)
	case kind == routePublic, kind == routeInstance && !s.cfg.BlockInstanceMetadata:
		return s.servePublic(w, r, s.cfg.PodsOnly)
	case kind == routeInstance:
		return s.blockedInstance(w, r)
	case kind == routeSensitive && slices.Contains(s.cfg.Allow, sensitive(pathOf(r))):
		return s.servePublic(w, r, true)
	default:
		return s.exceptedOnly(w, r, errNotFound)
	}
}

// servePublic passes through what is served to pods that are not excepted, if podsOnly to
// known pods alone: a plain GET, or the POST that approves events.
func (s *Server) servePublic(w http.ResponseWriter, r *http.Request, podsOnly bool) error {
	approves := r.Method == http.MethodPost && pathOf(r) == scheduledEvents
	switch {
	case r.Method != http.MethodGet && !approves:
		return s.exceptedOnly(w, r, errMethod)
	case r.ContentLength != 0 && !approves, r.Header["Upgrade"] != nil:
		// Nothing that is served here needs either, and both are ways to say more to
		// IMDS than the path does.
		return s.exceptedOnly(w, r, errNotPlain)
	}
	if podsOnly {
		if _, _, err := s.resolve(r); err != nil {
			return err
		}
	}
	dropOddHeaders(r.Header)
	return s.passThrough(w, r, "path", r.URL.Path)
}

// blockedInstance serves instance metadata where it is blocked: to the pods of some
// namespaces, and to excepted pods.
func (s *Server) blockedInstance(w http.ResponseWriter, r *http.Request) error {
	if len(s.cfg.InstanceMetadataNamespaces) > 0 {
		pod, _, err := s.resolve(r)
		if err != nil {
			return err
		}
		if pod.Exception() == "" && slices.Contains(s.cfg.InstanceMetadataNamespaces, pod.Namespace) {
			return s.servePublic(w, r, false) // the pod is known
		}
	}
	return s.exceptedOnly(w, r, errBlocked)
}

// exceptedOnly passes the request through if its pod is excepted, else returns refusal.
func (s *Server) exceptedOnly(w http.ResponseWriter, r *http.Request, refusal error) error {
	pod, _, err := s.resolve(r)
	if err != nil {
		return err
	}
	if pod.Exception() == "" {
		return refusal
	}
	return s.passThrough(w, r, "pod", pod, "exception", pod.Exception())
}

// callerOf is the address that a request came from; the zero one if its connection is not
// TCP.
func callerOf(r *http.Request) netip.Addr {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return from.Addr().Unmap()
}

// resolve finds the pod that sent the request, and makes sure that it is the one.
func (s *Server) resolve(r *http.Request) (*podresolver.Pod, netip.Addr, error) {
	addr := callerOf(r)
	if !addr.IsValid() {
		return nil, netip.Addr{}, errors.New("not a TCP connection: nobody is resolved")
	}
	ingress := 0
	if s.cfg.CheckSource != nil {
		ingress = listener.FromContext(r.Context()).Ingress()
	}
	pod, err := s.cfg.Pods.ResolveCaller(r.Context(), addr, func(pod *podresolver.Pod) error {
		if s.cfg.CheckSource == nil {
			return nil
		}
		err := s.cfg.CheckSource(addr, ingress, pod)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, podresolver.ErrUnconfirmed):
			return fmt.Errorf("pod %s: %w", pod, err)
		}
		return fmt.Errorf("pod %s: %w: %w", pod, ErrSource, err)
	})
	return pod, addr, err
}
