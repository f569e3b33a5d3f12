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
	"github.com/podidentity/nmi/tokencache"
)

// token is the spine: one request for a token, from its headers to its answer.
func (s *Server) token(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkHeaders(r); err != nil { // SDKs' probes end here, before any lookup
		return err
	}
	pod, addr, err := s.resolve(r)
	if err != nil {
		return err
	}
	if pod.Exception() != "" { // unprocessed, so before its query is judged
		return s.passThrough(w, r, "pod", pod, "exception", pod.Exception())
	}
	want, err := parseTokenRequest(r, queryRules{appService: s.cfg.MetadataHeaderOptional})
	if err != nil {
		return err
	}
	r.Header = nil // from here on it waits for others: what it holds meanwhile is bounded by its query
	identity, err := s.cfg.Pods.Identity(r.Context(), addr, pod, want.selector)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	key := keyOf(identity, want.resource)
	token, err := s.cached(r.Context(), key, addr, want)
	if err != nil {
		return fmt.Errorf("pod %s, identity %s/%s: %w", pod, identity.Namespace, identity.Name, err)
	}
	others, err := s.auxiliary(r.Context(), identity, addr, want)
	if err != nil {
		return fmt.Errorf("pod %s, identity %s/%s: %w", pod, identity.Namespace, identity.Name, err)
	}
	if s.log.Enabled(r.Context(), slog.LevelDebug) { // boxing the arguments costs more than the lookup did
		s.log.DebugContext(r.Context(), "token", "pod", pod, "identity", identity.Name, "resource", want.resource)
	}
	writeToken(w, token, others, time.Now())
	return nil
}

// cached gets the token from memory, unless the caller wants another than that. Whose
// token it is, an AzureIdentity with a resource ID alone does not say, and the answer
// does: a token that is withheld from pods is not returned, however it was asked for.
func (s *Server) cached(ctx context.Context, key tokencache.Key, caller netip.Addr, want tokenRequest) (token *tokencache.Token, err error) {
	switch {
	case want.bypass:
		token, err = s.cfg.Tokens.Renew(ctx, key, caller, nil)
	case want.refresh != "":
		token, err = s.cfg.Tokens.Renew(ctx, key, caller, func(token *tokencache.Token) bool {
			sum := sha256.Sum256([]byte(token.AccessToken))
			return strings.EqualFold(want.refresh, hex.EncodeToString(sum[:]))
		})
	default:
		token, err = s.cfg.Tokens.Get(ctx, key, caller)
	}
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Pods.CheckToken(token.ClientID); err != nil {
		return nil, err
	}
	return token, nil
}

// checkHeaders refuses a request that a pod may have been tricked into sending.
func (s *Server) checkHeaders(r *http.Request) error {
	// Exactly one, exactly "true": the real service refuses "True".
	if m := r.Header["Metadata"]; !s.cfg.MetadataHeaderOptional && (len(m) != 1 || m[0] != "true") {
		return errMetadataHeader
	}
	if r.Header["X-Forwarded-For"] != nil {
		return errForwarded
	}
	return nil
}

// auxiliary gets the tokens of auxiliary tenants, in their order and one after the other: a
// request has one fetch under way. Those that it got are in memory when it comes back.
func (s *Server) auxiliary(ctx context.Context, id podresolver.Identity, caller netip.Addr, want tokenRequest) ([]*tokencache.Token, error) {
	var tokens []*tokencache.Token
	for i, key := range auxiliaryKeys(id, want.resource) {
		token, err := s.cached(ctx, key, caller, want)
		if err != nil {
			return nil, fmt.Errorf("auxiliary tenant %s: %w", id.Principal.AuxiliaryTenantIDs[i], err)
		}
		tokens = append(tokens, token)
	}
	return tokens, nil
}
