package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// httpError is an answer that is not a token. The status tells SDKs what to do:
// they give up at once on 400, and come back on 503. On 404 and 5xx without
// Retry-After azidentity goes on for 70 s, so no definitive "no" uses those,
// save for paths that are not served at all.
type httpError struct {
	status      int
	code        string // "error"
	description string // "error_description"; "" leaves the field out
	retryAfter  time.Duration
}

func (e *httpError) Error() string {
	if e.description == "" {
		return e.code
	}
	return e.code + ": " + e.description
}

func badRequest(description string) *httpError {
	return &httpError{status: http.StatusBadRequest, code: "invalid_request", description: description}
}

func notYet(description string, retryAfter time.Duration) *httpError {
	return &httpError{status: http.StatusServiceUnavailable, code: "temporarily_unavailable", description: description, retryAfter: retryAfter}
}

var (
	// The service's own words, to the letter: SDKs compare them.
	errMetadataHeader = badRequest("Required metadata header not specified")
	errNoIdentity     = badRequest("Identity not found")
	errSeveral        = badRequest("Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request")
	errNotFound       = &httpError{status: http.StatusNotFound, code: "Not Found"}

	errNotPlain  = badRequest("Requests with a body or for an upgrade are not served")
	errForwarded = badRequest("Requests with an X-Forwarded-For header are not served")
	errMethod    = &httpError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", description: "Only GET is served here"}
	errTooLarge  = &httpError{status: http.StatusRequestEntityTooLarge, code: "invalid_request", description: "The body of a request has at most 64 KiB here"}
	errBody      = badRequest("The body of the request cannot be read")
	errTooMany   = &httpError{status: http.StatusTooManyRequests, code: "invalid_request", description: "Too many requests at once", retryAfter: retrySoon}
	errHeld      = &httpError{status: http.StatusServiceUnavailable, code: "temporarily_unavailable", description: "Too many answers wait to be read", retryAfter: retrySoon}
	errLong      = &httpError{status: http.StatusBadGateway, code: "bad_gateway", description: "The metadata service's answer is longer than 1 MiB"}
	errBlocked   = &httpError{status: http.StatusForbidden, code: "forbidden", description: "Instance metadata is blocked for pods of this node"}
)

// ErrSource means that the caller may be another pod than its address says, and that no
// news will tell.
var ErrSource = errors.New("its source address cannot be trusted")

// retrySoon is the Retry-After for what a moment may change.
const retrySoon = time.Second

// asHTTP decides how an error of any room is told to the pod. Nothing internal
// is in it: which pod, binding or address it was about is for the log.
func asHTTP(err error) *httpError {
	var own *httpError
	var failed *tokencache.Failure
	var long *http.MaxBytesError
	var byProxy *upstream.Error
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &long):
		return errTooLarge
	case errors.Is(err, upstream.ErrHeld):
		return errHeld
	case errors.Is(err, upstream.ErrLongAnswer):
		return errLong
	case errors.Is(err, podresolver.ErrNoIdentity):
		return errNoIdentity
	case errors.Is(err, podresolver.ErrMultipleIdentities):
		return errSeveral
	case errors.Is(err, podresolver.ErrNotAssigned):
		return notYet("The identity is not assigned to the pod yet", 5*time.Second)
	case errors.Is(err, podresolver.ErrNotSynced):
		return notYet("The agent is not in sync with the API server yet", retrySoon)
	case errors.Is(err, podresolver.ErrStale):
		return notYet("What is known of pods and identities is too old", 10*time.Second)
	case errors.Is(err, podresolver.ErrUnconfirmed):
		return notYet("The pod of this address is not known yet", retrySoon)
	case errors.Is(err, ErrSource):
		return badRequest("The network of this node does not tell which pod is calling; ask the operators of the cluster")
	case errors.Is(err, podresolver.ErrUnknownPod):
		return notYet("The pod is not known on this node yet", retrySoon)
	case errors.Is(err, podresolver.ErrUnknownAddress):
		return notYet("The pod of this address is not known yet", retrySoon)
	case errors.Is(err, podresolver.ErrAmbiguousAddress):
		return notYet("The address is claimed by more than one pod", 5*time.Second)
	case errors.Is(err, tokencache.ErrKeyTooLong):
		return badRequest("The resource is too long")
	case errors.As(err, &failed):
		return noToken(failed)
	case errors.As(err, &byProxy): // of what was passed through
		return notYet("The metadata service is not available", retrySoon)
	default:
		return notYet("The metadata service could not be asked", retrySoon)
	}
}

// Answer is what a pod is told of an error of podresolver, for texts to operators: the
// status, and the error's fields.
func Answer(err error) string {
	e := asHTTP(err)
	return fmt.Sprintf("%d %s", e.status, e)
}

// noToken tells why the cache has no token: in the service's own words where they are
// about the request or the identity. What is wrong with a service principal's
// credential is for the operators, who find it in the log.
func noToken(f *tokencache.Failure) *httpError {
	var said *upstream.Error
	var credential *upstream.CredentialError
	again := max(f.RetryAfter, retrySoon)
	switch {
	case f.Class == tokencache.Throttled:
		return &httpError{
			status: http.StatusTooManyRequests, code: "invalid_request",
			description: "Temporarily throttled, too many requests", retryAfter: again,
		}
	case f.Class == tokencache.Refused && errors.As(f, &said) && said.Code != "":
		return &httpError{status: http.StatusBadRequest, code: said.Code, description: said.Description}
	case f.Class == tokencache.Refused && errors.As(f, &credential):
		return &httpError{
			status: http.StatusBadRequest, code: "invalid_client",
			description: "The credential of this identity cannot be used; the operators of the cluster find the reason in the log of the node's agent",
		}
	case f.Class == tokencache.Refused:
		return badRequest("The metadata service refused the request")
	case errors.Is(f, tokencache.ErrBusy):
		return notYet("Other pods of this node ask for more tokens than Azure gives at once", again)
	case errors.As(f, &credential):
		return notYet("The credential of this identity cannot be read now", again)
	case errors.Is(f, upstream.ErrEntra), errors.As(f, &said) && said.Source == "Entra":
		return notYet("Entra is not available", again)
	case !errors.As(f, &said) && errors.Is(f, context.DeadlineExceeded):
		return notYet("The metadata service did not answer in time", again)
	default:
		return notYet("The metadata service is not available", again)
	}
}

// withHint adds for the log what an operator has to do: where IMDS's words, which the pod
// is told, read as if nothing were bound to it, or where something nearly gives the pod
// what it asked for.
func (s *Server) withHint(err error) error {
	var said *upstream.Error
	if errors.As(err, &said) && said.UnknownIdentity() {
		return fmt.Errorf("%w (bound, but IMDS does not know this identity on this node: assign it to the scale set (VM) or correct the AzureIdentity)", err)
	}
	if hint := s.cfg.Pods.Hint(err); hint != "" {
		return fmt.Errorf("%w; near misses: %s", err, hint)
	}
	return err
}

// refuse writes an error, and logs it where an operator may have to act.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	e := asHTTP(err)
	var own *httpError
	switch {
	case r.Context().Err() != nil: // the client has gone, or at least finished sending
	case errors.As(err, &own): // the client's own mistake, and it is told all there is to say
		s.log.DebugContext(r.Context(), "refused", "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path, "status", e.status, "error", err)
	case s.refusals.allow(callerOf(r)):
		s.log.InfoContext(r.Context(), "not served", "from", r.RemoteAddr, "status", e.status, "error", s.withHint(err))
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((e.retryAfter+time.Second-1)/time.Second)))
	}
	body, err := json.Marshal(struct {
		Error       string `json:"error"`
		Description string `json:"error_description,omitempty"`
	}{e.code, e.description})
	if err != nil { // strings cannot fail
		panic(err)
	}
	r.Header = nil // the client may take its time to read
	writeJSON(w, e.status, body)
}
