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
		s.passOn(w, r, "pod", pod, "exception", pod.Exception())
		return nil
	}
	want, err := parseTokenRequest(r)
	if err != nil {
		return err
	}
	identity, err := s.cfg.Pods.Identity(r.Context(), addr, pod, want.selector)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	key, err := keyOf(identity, want.resource)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	token, err := s.cached(r.Context(), key, addr, want)
	if err != nil {
		return fmt.Errorf("pod %s, identity %s/%s: %w", pod, identity.Namespace, identity.Name, err)
	}
	if s.log.Enabled(r.Context(), slog.LevelDebug) { // boxing the arguments costs more than the lookup did
		s.log.DebugContext(r.Context(), "token", "pod", pod, "identity", identity.Name, "resource", want.resource)
	}
	s.finish(w.Header())
	writeToken(w, token, time.Now())
	return nil
}

// cached gets the token from memory, unless the caller wants another than that.
func (s *Server) cached(ctx context.Context, key tokencache.Key, caller netip.Addr, want tokenRequest) (*tokencache.Token, error) {
	switch {
	case want.bypass:
		return s.cfg.Tokens.Renew(ctx, key, caller, nil)
	case want.refresh != "":
		return s.cfg.Tokens.Renew(ctx, key, caller, func(token *tokencache.Token) bool {
			sum := sha256.Sum256([]byte(token.AccessToken))
			return strings.EqualFold(want.refresh, hex.EncodeToString(sum[:]))
		})
	default:
		return s.cfg.Tokens.Get(ctx, key, caller)
	}
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

// keyOf joins a decided identity to a resource. It is the one place where the
// two meet.
func keyOf(id podresolver.Identity, resource string) (tokencache.Key, error) {
	if !id.Managed() {
		return tokencache.Key{}, &typeError{id}
	}
	if id.ClientID != "" { // it names the identity alone, so that pods with either spelling share the token
		return tokencache.Key{ClientID: id.ClientID, Resource: resource}, nil
	}
	return tokencache.Key{ResourceID: id.ResourceID, Resource: resource}, nil
}

// InUse tells the cache whether the pod that holds an address may have a token now, so
// that it is refreshed without being asked for; see tokencache.Config.
func InUse(pods *podresolver.Resolver) func(netip.Addr, tokencache.Key) bool {
	return func(caller netip.Addr, key tokencache.Key) bool {
		pod := pods.Holder(caller)
		if pod == nil {
			return false
		}
		for identity := range pod.Identities() {
			if may, err := keyOf(identity, key.Resource); err == nil && may == key {
				return true
			}
		}
		return false
	}
}

// typeError is an identity of a type that the agent cannot become.
type typeError struct{ identity podresolver.Identity }

func (e *typeError) Error() string {
	return fmt.Sprintf("AzureIdentity %s/%s is of type %d (%s), which this agent does not serve; only type 0 (user-assigned managed identity) is served",
		e.identity.Namespace, e.identity.Name, e.identity.Type, e.identity.Type)
}
