package proxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
	"unique"

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
	s.finish(w.Header())
	writeToken(w, token, others, time.Now())
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
func keyOf(id podresolver.Identity, resource string) tokencache.Key {
	switch {
	case id.Principal != nil:
		return tokencache.Key{ClientID: id.ClientID, Resource: resource, Principal: principalIn(id, id.Principal.TenantID)}
	case id.ClientID != "": // it names the identity alone, so that pods with either spelling share the token
		return tokencache.Key{ClientID: id.ClientID, Resource: resource}
	default:
		return tokencache.Key{ResourceID: id.ResourceID, Resource: resource}
	}
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
			if keyOf(identity, key.Resource) == key || slices.Contains(auxiliaryKeys(identity, key.Resource), key) {
				return true
			}
		}
		return false
	}
}

// principalIn is what a key says of a service principal in one of its tenants.
func principalIn(id podresolver.Identity, tenant string) unique.Handle[tokencache.Principal] {
	return unique.Make(tokencache.Principal{
		TenantID: tenant, Authority: id.Principal.Authority,
		Certificate:     id.Principal.Certificate,
		SecretNamespace: id.Principal.SecretNamespace, SecretName: id.Principal.SecretName,
	})
}

// auxiliaryKeys are those of a service principal's auxiliary tenants, in their
// order. Other identities have none.
func auxiliaryKeys(id podresolver.Identity, resource string) []tokencache.Key {
	if id.Principal == nil || len(id.Principal.AuxiliaryTenantIDs) == 0 {
		return nil
	}
	keys := make([]tokencache.Key, len(id.Principal.AuxiliaryTenantIDs))
	for i, tenant := range id.Principal.AuxiliaryTenantIDs {
		keys[i] = tokencache.Key{ClientID: id.ClientID, Resource: resource, Principal: principalIn(id, tenant)}
	}
	return keys
}

// auxiliary gets the tokens of auxiliary tenants, all at once, in their order.
func (s *Server) auxiliary(ctx context.Context, id podresolver.Identity, caller netip.Addr, want tokenRequest) ([]*tokencache.Token, error) {
	keys := auxiliaryKeys(id, want.resource)
	if keys == nil {
		return nil, nil
	}
	tokens, failures := make([]*tokencache.Token, len(keys)), make([]error, len(keys))
	var asking sync.WaitGroup
	for i, key := range keys {
		asking.Go(func() { tokens[i], failures[i] = s.cached(ctx, key, caller, want) })
	}
	asking.Wait()
	for i, err := range failures {
		if err != nil {
			return nil, fmt.Errorf("auxiliary tenant %s: %w", id.Principal.AuxiliaryTenantIDs[i], err)
		}
	}
	return tokens, nil
}
