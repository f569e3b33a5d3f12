package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// token serves one request for a token, from its headers to its response.
func (s *Server) token(w *response, r *http.Request) error {
	if err := s.checkHeaders(r); err != nil { // SDKs' probes end here, without any lookup
		return err
	}
	conn := listener.FromContext(r.Context())
	addr := callerOf(r)
	pod, err := s.resolve(r.Context(), addr, conn)
	if err != nil {
		return err
	}
	if pod.Exception() != "" { // before its query is parsed: IMDS does that
		return s.passThrough(w, r, "pod", pod, "exception", pod.Exception())
	}
	req, err := parseTokenRequest(r, queryRules{appServiceNames: s.cfg.MetadataHeaderOptional})
	if err != nil {
		return err
	}
	head, known := s.heads.of(conn, r, req)
	ctx := s.traced(r)
	r.Header = nil // from here on the request may wait, and holds no more memory than its query
	a, err := s.tokens(ctx, pod, addr, req)
	if err != nil {
		return err
	}
	w.source = a.source.String()
	switch {
	case head == nil || len(a.auxiliary) > 0:
	case !known:
		s.heads.add(addr, head)
	case !head.last && !conn.Pipelined() && s.takeBack(w, conn, a.token): // not for one that may never come again
		return nil
	}
	writeToken(w, a.token, a.auxiliary, time.Now().Unix())
	return nil
}

// traced is the request's context, with its span if it is traced.
func (s *Server) traced(r *http.Request) context.Context {
	if s.cfg.Trace == nil {
		return r.Context()
	}
	return s.cfg.Trace(r.Context(), r.Header)
}

// answer is what a request for a token gets. It is small enough to be returned in registers.
type answer struct {
	token     *tokencache.Token
	auxiliary []*tokencache.Token // of auxiliary tenants
	source    tokencache.Source   // of the token that took longest
	// at is when it was looked for, in Unix time: to read the clock takes as long as to find a
	// token in memory.
	at int64
}

// tokens decides which identity a pod's request gets, and returns its tokens. The pod must be the
// one that the caller's address was resolved to just now.
func (s *Server) tokens(ctx context.Context, pod *podresolver.Pod, caller netip.Addr, req tokenRequest) (a answer, err error) {
	identity, err := s.cfg.Pods.Identity(ctx, caller, pod, req.selector)
	if err != nil {
		return a, &podError{pod, fmt.Errorf("pod %s: %w", pod, err)}
	}
	at := time.Now() // not before: the identity may have been waited for
	a.at = at.Unix()
	a.token, a.source, err = s.cached(ctx, keyOf(identity, req.resource), caller, req, at)
	if err == nil && identity.Principal != nil {
		err = s.addAuxiliary(ctx, &a, identity, caller, req)
	}
	if err != nil {
		return a, &podError{pod, fmt.Errorf("pod %s, identity %s/%s: %w", pod, identity.Namespace, identity.Name, err)}
	}
	if s.log.Enabled(ctx, slog.LevelDebug) { // boxing the arguments costs more than the lookup
		s.log.DebugContext(ctx, "token", "pod", pod, "identity", identity.Name, "resource", req.resource)
	}
	return a, nil
}

// cached returns the token from memory, unless the request is for a new one. If the
// AzureIdentity has a resource ID only, just the token tells its client ID, which may be
// one that is withheld from pods: then it is not returned.
func (s *Server) cached(ctx context.Context, key tokencache.Key, caller netip.Addr, req tokenRequest, at time.Time) (token *tokencache.Token, source tokencache.Source, err error) {
	switch {
	case req.bypassCache:
		token, source, err = s.cfg.Tokens.Renew(ctx, key, caller, nil)
	case req.refreshSHA256 != "":
		token, source, err = s.cfg.Tokens.Renew(ctx, key, caller, func(token *tokencache.Token) bool {
			sum := sha256.Sum256([]byte(token.AccessToken))
			return strings.EqualFold(req.refreshSHA256, hex.EncodeToString(sum[:]))
		})
	default:
		token, source, err = s.cfg.Tokens.GetAt(ctx, key, caller, at)
	}
	if err != nil {
		return nil, source, err
	}
	if err := s.cfg.Pods.CheckToken(token.ClientID); err != nil {
		return nil, source, err
	}
	return token, source, nil
}

// checkHeaders refuses requests that a pod may have been tricked into sending.
func (s *Server) checkHeaders(r *http.Request) error {
	// Exactly one, exactly "true": IMDS refuses "True".
	if m := r.Header["Metadata"]; !s.cfg.MetadataHeaderOptional && (len(m) != 1 || m[0] != "true") {
		return errMetadataHeader
	}
	if r.Header["X-Forwarded-For"] != nil {
		return errForwarded
	}
	return nil
}

// addAuxiliary adds the tokens of the auxiliary tenants, in their order. It gets one after the
// other, so that a request has one fetch in flight. After an error, those before it are in
// memory for the next request.
func (s *Server) addAuxiliary(ctx context.Context, a *answer, id podresolver.Identity, caller netip.Addr, req tokenRequest) error {
	for i, key := range auxiliaryKeys(id, req.resource) {
		token, source, err := s.cached(ctx, key, caller, req, time.Now())
		if err != nil {
			return fmt.Errorf("auxiliary tenant %s: %w", id.Principal.AuxiliaryTenantIDs[i], err)
		}
		a.auxiliary = append(a.auxiliary, token)
		a.source = max(a.source, source)
	}
	return nil
}
