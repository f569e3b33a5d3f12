package proxy

import (
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/tokencache"
)

// token is the spine: one request for a token, from its headers to its answer.
func (s *Server) token(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkHeaders(r); err != nil { // SDKs' probes end here, before any lookup
		return err
	}
	pod, err := s.resolve(r)
	if err != nil {
		return err
	}
	if pod.Exception() != "" { // unprocessed, so before its query is judged
		s.passOn(w, r, pod)
		return nil
	}
	want, err := parseTokenRequest(r)
	if err != nil {
		return err
	}
	identity, err := pod.Identity(want.selector)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	key, err := keyOf(identity, want.resource)
	if err != nil {
		return fmt.Errorf("pod %s: %w", pod, err)
	}
	token, err := s.cfg.Tokens.Get(r.Context(), key)
	if err != nil {
		return fmt.Errorf("pod %s, identity %s/%s: %w", pod, identity.Namespace, identity.Name, err)
	}
	s.log.DebugContext(r.Context(), "token", "pod", pod, "identity", identity.Name, "resource", want.resource)
	writeToken(w, token, time.Now())
	return nil
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

// tokenRequest is what a query asks for.
type tokenRequest struct {
	resource string
	selector podresolver.Selector
}

// parseTokenRequest reads the query. Parameters that it does not know are left
// alone (newer SDKs send some); those that it knows may come once.
func parseTokenRequest(r *http.Request) (tokenRequest, error) {
	if r.Method != http.MethodGet {
		return tokenRequest{}, errMethod
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return tokenRequest{}, badRequest("The query cannot be parsed: encode the parameters")
	}
	var once error
	value := func(name string) string {
		if len(query[name]) > 1 {
			once = badRequest("Query variable '" + name + "' was given more than once")
		}
		return query.Get(name)
	}
	version := value("api-version")
	req := tokenRequest{
		resource: value("resource"),
		selector: podresolver.Selector{ClientID: value("client_id"), ObjectID: value("object_id")},
	}
	msi, mi := value("msi_res_id"), value("mi_res_id")
	req.selector.ResourceID = msi + mi // at most one is set, or the request is refused below
	named := 0
	for _, id := range []string{req.selector.ClientID, req.selector.ObjectID, msi, mi} {
		if id != "" {
			named++
		}
	}
	switch {
	case once != nil:
		return tokenRequest{}, once
	case version == "":
		return tokenRequest{}, badRequest("Required query variable 'api-version' is missing")
	case req.resource == "":
		return tokenRequest{}, badRequest("Required query variable 'resource' is missing")
	case named > 1:
		return tokenRequest{}, badRequest("client_id, object_id, msi_res_id and mi_res_id exclude each other: name the identity by one of them")
	}
	return req, nil
}

// keyOf joins a decided identity to a resource. It is the one place where the
// two meet.
func keyOf(id podresolver.Identity, resource string) (tokencache.Key, error) {
	if id.Type != aadpodidentity.UserAssignedMSI {
		return tokencache.Key{}, badRequest(fmt.Sprintf(
			"AzureIdentity %s/%s is of type %d (%s), which this agent does not serve; only type 0 (user-assigned managed identity) is served",
			id.Namespace, id.Name, id.Type, id.Type))
	}
	if id.ClientID != "" { // it names the identity alone, so that pods with either spelling share the token
		return tokencache.Key{ClientID: id.ClientID, Resource: resource}, nil
	}
	return tokencache.Key{ResourceID: id.ResourceID, Resource: resource}, nil
}
