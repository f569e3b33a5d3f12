package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// hostTokenPath is where a program of the node requests a token for a pod by name: the
// provider of the Secrets Store CSI driver, which mounts secrets before the pod has an
// address. Path, headers and response are the old NMI's. The provider ends the path with a
// slash (its pkg/auth/auth.go).
const hostTokenPath = "/host/token"

// errHostUser means that the user of a process may not use /host/token.
var errHostUser = &httpError{status: http.StatusForbidden, code: "forbidden", description: "This user may not request tokens for pods"}

// host serves a request of the node's own: as a pod's, but for a pod that it names.
func (s *Server) host(w *response, r *http.Request, conn *listener.Conn) error {
	if !isHostTokenPath(r) || len(s.cfg.HostTokenUIDs) == 0 {
		return errNotFound
	}
	if err := s.checkUser(r, conn); err != nil {
		return err
	}
	if r.Header["X-Forwarded-For"] != nil { // a process that may ask, asking for one that may not
		return errForwarded
	}
	namespace, name := r.Header.Get("podns"), r.Header.Get("podname")
	if namespace == "" || name == "" {
		return badRequest("The headers 'podns' and 'podname' must name the pod")
	}
	req, err := parseTokenRequest(r, queryRules{versionOptional: true})
	if err != nil {
		return err
	}
	identity, addr, err := s.cfg.Pods.NamedIdentity(r.Context(), namespace, name, req.selector)
	if err != nil {
		return fmt.Errorf("on behalf of %s/%s: %w", namespace, name, err)
	}
	// It counts towards the pod's bounds. A pod without an address has none: it is about to
	// start, and the kubelet limits how often the provider asks for it.
	token, source, err := s.cached(s.traced(r), keyOf(identity, req.resource), addr, tokenRequest{}, time.Now())
	if err != nil {
		return fmt.Errorf("on behalf of %s/%s, identity %s/%s: %w", namespace, name, identity.Namespace, identity.Name, err)
	}
	w.source = source.String()
	s.log.DebugContext(r.Context(), "host token", "pod", namespace+"/"+name, "identity", identity.Name, "resource", req.resource)
	return writeHostToken(w, token, identity, time.Now())
}

func isHostTokenPath(r *http.Request) bool {
	path, _, _ := strings.Cut(r.RequestURI, "?")
	return strings.TrimSuffix(path, "/") == hostTokenPath
}

// checkUser refuses processes of users that are not in HostTokenUIDs. (The old NMI served any
// process of the node.)
func (s *Server) checkUser(r *http.Request, conn *listener.Conn) error {
	uid, err := conn.SocketUID()
	if err != nil {
		return fmt.Errorf("%w: looking up the user of its socket: %w", errHostUser, err)
	}
	if !slices.Contains(s.cfg.HostTokenUIDs, uid) {
		if s.logLimit.allow(callerOf(r)) {
			s.log.WarnContext(r.Context(), "refused a pod's token to a process of this node; --host-token-uids lists the users that may request one", "uid", uid)
		}
		return errHostUser
	}
	return nil
}

// hostToken is the old NMI's response: the token's fields, all of them strings, and the client
// ID.
type hostToken struct {
	Token struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
		ExpiresIn    string `json:"expires_in"`
		ExpiresOn    string `json:"expires_on"`
		NotBefore    string `json:"not_before"`
		Resource     string `json:"resource"`
		Type         string `json:"token_type"`
	} `json:"token"`
	ClientID string `json:"clientid"`
}

func writeHostToken(w http.ResponseWriter, t *tokencache.Token, identity podresolver.Identity, now time.Time) error {
	response := hostToken{ClientID: identity.ClientID}
	response.Token.AccessToken = t.AccessToken
	response.Token.ExpiresIn = strconv.FormatInt(max(t.ExpiresOn.Unix()-now.Unix(), 0), 10)
	response.Token.ExpiresOn = strconv.FormatInt(t.ExpiresOn.Unix(), 10)
	response.Token.NotBefore = strconv.FormatInt(max(t.NotBefore.Unix(), 0), 10)
	response.Token.Resource = t.Resource
	response.Token.Type = t.TokenType
	body, err := json.Marshal(response)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}
