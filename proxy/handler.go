package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
)

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	began := time.Now()
	w := &response{
		ResponseWriter: rw, draining: &s.draining,
		// Where a request ends may be in doubt: Content-Length beside Transfer-Encoding, and
		// Transfer-Encoding in HTTP/1.0, must end the connection (RFC 9112, 6.1), and
		// http.Server hides both. So whatever has a body ends it, and all of HTTP/1.0.
		last: r.ContentLength != 0 || !r.ProtoAtLeast(1, 1),
	}
	defer func() { // also when ReverseProxy panics, because the client has gone
		s.requests.record(requestKey{method: methodName(r.Method), route: routeName(r), status: w.status, source: w.source}, time.Since(began))
	}()
	if err := s.handle(w, r); err != nil {
		s.refuse(w, r, err)
	}
}

func (s *Server) handle(w *response, r *http.Request) error {
	if r.Method == http.MethodConnect || r.ProtoMajor != 1 {
		// Not even for excepted pods: if IMDS understood a tunnel (RFC 9110, 9.3.6) or a
		// preface of HTTP/2, the requests of other pods on that connection would be in it.
		return errMethod
	}
	if conn := listener.FromContext(r.Context()); conn.Loopback() {
		return s.host(w, r, conn)
	}
	switch kind := route(r.RequestURI); {
	case kind == routeToken:
		return s.token(w, r)
	case kind == routePresence:
		return s.presence(w, r)
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
	approval := r.Method == http.MethodPost && pathOf(r) == scheduledEvents
	switch {
	case r.Method != http.MethodGet && !approval:
		return s.exceptedOnly(w, r, errMethod)
	case r.ContentLength != 0 && !approval, r.Header["Upgrade"] != nil:
		// No public path needs either, and both tell IMDS more than the path does.
		return s.exceptedOnly(w, r, errNotPlain)
	}
	if podsOnly {
		if _, err := s.resolve(r.Context(), callerOf(r), listener.FromContext(r.Context())); err != nil {
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
		pod, err := s.resolve(r.Context(), callerOf(r), listener.FromContext(r.Context()))
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
	pod, err := s.resolve(r.Context(), callerOf(r), listener.FromContext(r.Context()))
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

// peerOf is the address and port that a request came from, for logs. That of a caller whom the
// kernel has named, see listener.OnlyIdentified, is not in RemoteAddr.
func peerOf(r *http.Request) string {
	if peer := listener.FromContext(r.Context()).Peer(); peer != nil {
		return peer.String()
	}
	return r.RemoteAddr
}

// resolve finds the pod that has the caller's address, and checks that the connection is its.
func (s *Server) resolve(ctx context.Context, caller netip.Addr, conn *listener.Conn) (*podresolver.Pod, error) {
	if !caller.IsValid() {
		return nil, errors.New("not a TCP connection, so it has no pod")
	}
	ingress := s.ingressOf(conn)
	return s.cfg.Pods.ResolveCaller(ctx, caller, func(pod *podresolver.Pod) error { return s.confirm(pod, caller, ingress) })
}

// resolveNow is resolve for a request that does not wait.
func (s *Server) resolveNow(conn *listener.Conn) (*podresolver.Pod, error) {
	caller, ingress := conn.Caller(), s.ingressOf(conn)
	return s.cfg.Pods.ResolveNow(caller, func(pod *podresolver.Pod) error { return s.confirm(pod, caller, ingress) })
}

// ingressOf is the interface that confirm needs.
func (s *Server) ingressOf(conn *listener.Conn) int {
	if s.cfg.CheckSource == nil {
		return 0
	}
	return conn.Ingress()
}

// confirm checks that a connection is the pod's.
func (s *Server) confirm(pod *podresolver.Pod, caller netip.Addr, ingress int) error {
	if s.cfg.CheckSource == nil {
		return nil
	}
	return s.checkSource(pod, caller, ingress)
}

func (s *Server) checkSource(pod *podresolver.Pod, caller netip.Addr, ingress int) error {
	err := s.cfg.CheckSource(caller, ingress, pod)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, podresolver.ErrUnconfirmed):
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	return &podError{pod, fmt.Errorf("pod %s: %w: %w", pod, ErrSource, err)}
}
