// Package proxy serves pods over HTTP in the place of Azure's instance metadata service
// (IMDS).
//
// The life of a request:
//
//  1. accept: connections that the kernel did not redirect are refused, and the number of
//     others is bounded, see package listener.
//  2. route: the raw path is matched, exactly, against a short list, see route.
//  3. parse: first the header check, since SDKs probe without it and wait for a second at
//     most, then the query.
//  4. resolve: the source address becomes a pod, if the node's network shows that the
//     address is the pod's. An excepted pod's request is passed through to IMDS.
//  5. decide: the pod's identities and the query select one. This happens for every
//     request, before the cache is looked at.
//  6. cache: the token comes from memory, or from upstream once for all callers.
//  7. respond: expires_in is computed for each response; errors are JSON in IMDS's shape.
//
// This is the only package that knows the HTTP status codes that pods get.
package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// Defaults of Config.
const (
	// DefaultMaxConnections is two for each of 250 pods.
	DefaultMaxConnections       = 512
	DefaultMaxConnectionsPerPod = 64
)

// Config configures a Server. Pods, Tokens and Upstream are required.
type Config struct {
	Pods     *podresolver.Resolver
	Tokens   *tokencache.Cache
	Upstream http.RoundTripper // to IMDS, for what is passed through

	// MetadataHeaderOptional turns off the check for "Metadata: true". Without the check, a
	// pod that fetches URLs for others can be tricked into fetching tokens. Clients of App
	// Service, which do not send that header, may then use its parameter names, too.
	MetadataHeaderOptional bool
	// BlockInstanceMetadata makes /metadata/instance 403, except for excepted pods and for
	// those of InstanceMetadataNamespaces.
	BlockInstanceMetadata      bool
	InstanceMetadataNamespaces []string
	// Allow lists the AllowablePaths that pods may request; none by default.
	Allow []string
	// PodsOnly serves pods of this node only. Without it, public paths are served to any
	// caller; listener.OnlyRedirected is then the only check.
	PodsOnly bool
	// CheckSource returns an error if a connection from addr, over the interface with the
	// index ingress (0 if unknown), may not be from pod, which has the address according to
	// the API server. Nothing that depends on the caller is served then. If the error wraps
	// podresolver.ErrUnconfirmed, newer data may clear it, and the request waits for that.
	// nil trusts all addresses.
	CheckSource func(addr netip.Addr, ingress int, pod *podresolver.Pod) error

	// HostTokenUIDs are the users of this node whose processes may request tokens for pods
	// by name, at /host/token over loopback. If empty, the path is 404.
	HostTokenUIDs []uint32

	// Version is the agent's, for /metadata/nmi.
	Version string

	// MaxConnections and MaxConnectionsPerPod bound the open connections, in all and of one
	// address; 0 means DefaultMaxConnections and DefaultMaxConnectionsPerPod.
	MaxConnections, MaxConnectionsPerPod int

	// Trace returns a context with the span that a request says it is part of, for
	// tokencache.Request. nil traces nothing.
	Trace func(ctx context.Context, header http.Header) context.Context

	// Refused is called, as often as the log has a line, for pods that are not served. It must
	// not wait. nil calls nothing.
	Refused func(Denial)

	Logger *slog.Logger // nil means slog.Default
}

// Server serves pods.
type Server struct {
	cfg          Config
	http         *http.Server
	reverseProxy *httputil.ReverseProxy
	log          *slog.Logger
	draining     atomic.Bool // see setDraining
	drainingMu   sync.Mutex  // guards stopping, and the writing of draining
	stopping     bool        // the context of Serve has ended

	logLimit logLimit
	refusals *refusals
	conns    *listener.Limiter

	front    *front      // once Serve runs
	heads    *knownHeads // nil disables the fast path, for tests
	date     httpDate
	requests requests
}

const (
	readHeaderTimeout = 5 * time.Second
	// readTimeout bounds the reading of a request with its body, wanted or not:
	// http.Server reads to its end even after the response. It does not bound the wait for
	// the response.
	readTimeout = 30 * time.Second
	idleTimeout = 2 * time.Minute
	// maxHeaderBytes bounds a head at 8 KiB: http.Server adds 4 (initialReadLimitSize).
	maxHeaderBytes = 8<<10 - 4096
	// lingerTimeout is how long Serve, when it stops, waits for each connection to have
	// one more request.
	lingerTimeout = time.Second
	// drainTimeout is how long it then waits for requests in flight; Kubernetes kills after
	// 30 s by default.
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
		cfg: cfg, log: cfg.Logger, logLimit: newLogLimit(), refusals: newRefusals(), heads: newKnownHeads(),
		conns: listener.NewLimiter(cfg.MaxConnections, cfg.MaxConnectionsPerPod),
	}
	s.reverseProxy = s.newReverseProxy()
	s.http = &http.Server{
		Handler:                      s,
		ConnContext:                  s.conns.ConnContext,
		ConnState:                    s.conns.ConnState,
		DisableGeneralOptionsHandler: true, // "OPTIONS *" is handled like others
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // errors of clients
	}
	return s
}

// Serve serves the connections that ln accepts until ctx ends, then closes ln, lets requests
// in flight finish for at most 15 s, and returns nil. It returns an error if ln fails before
// that. It fixes the sizes of the kernel's buffers, see listener.FixBuffers.
//
// When ctx ends, idle connections stay open for one more second or request, whose response
// tells the client that the connection closes: a request that arrives at a connection that
// is being closed is lost (RFC 9112, 9.6), and so is one that http.Server reads after
// Shutdown.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	if err := listener.FixBuffers(ln); err != nil {
		s.log.Warn("cannot set the size of socket buffers; connections may use more memory than their limits allow for", "error", err)
	}
	ended := make(chan error, 1)
	s.front = newFront(s.conns.Listener(ln), s.fastPath)
	go func() { ended <- s.http.Serve(s.front) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	s.setDraining(true, true)
	s.front.stop()
	select {
	case <-s.conns.Drain():
	case <-time.After(lingerTimeout):
	}
	s.endFastPath()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := s.http.Shutdown(drain); err != nil {
		s.log.Warn("closing connections whose requests did not finish in time", "error", err)
		_ = s.http.Close() // what Shutdown left; its error is the same
	}
	return nil
}

// endFastPath closes the connections of the fast path, which have had no request since the
// server is draining.
func (s *Server) endFastPath() {
	ended := make(chan struct{})
	go func() { s.front.serving.Wait(); close(ended) }()
	for {
		s.conns.EndNext() // again, for one that was about to wait
		select {
		case <-ended:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// SetDraining makes the server close each connection with its next response, so that
// clients connect again and reach another server that accepts from the same socket; or,
// with false, keep connections open again, unless Serve is stopping.
func (s *Server) SetDraining(draining bool) { s.setDraining(draining, false) }

func (s *Server) setDraining(draining, stopping bool) {
	s.drainingMu.Lock()
	defer s.drainingMu.Unlock()
	s.stopping = s.stopping || stopping
	s.draining.Store(draining || s.stopping)
}
