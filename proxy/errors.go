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

// httpError is an error response. The status tells SDKs what to do: they give up on 400, and
// retry after 503. After 404, and 5xx without Retry-After, azidentity retries for 70 s, so
// permanent errors do not use those, except 404 for paths that are not served.
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
	// IMDS's own words, to the byte: SDKs compare them.
	errMetadataHeader = badRequest("Required metadata header not specified")
	errNoIdentity     = badRequest("Identity not found")
	errSeveral        = badRequest("Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request")
	errNotFound       = &httpError{status: http.StatusNotFound, code: "Not Found"}

	errNotPlain  = badRequest("Requests with a body or an upgrade are not served")
	errForwarded = badRequest("Requests with an X-Forwarded-For header are not served")
	errMethod    = &httpError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", description: "Only GET is served here"}
	errTooLarge  = &httpError{status: http.StatusRequestEntityTooLarge, code: "invalid_request", description: "The request body is longer than 64 KiB"}
	errBody      = badRequest("The body of the request cannot be read")
	errTooMany   = &httpError{status: http.StatusTooManyRequests, code: "invalid_request", description: "Too many requests at once", retryAfter: retrySoon}
	errHeld      = &httpError{status: http.StatusServiceUnavailable, code: "temporarily_unavailable", description: "Too many responses of this pod are unread", retryAfter: retrySoon}
	errLong      = &httpError{status: http.StatusBadGateway, code: "bad_gateway", description: "The metadata service's response is longer than 1 MiB"}
	errBlocked   = &httpError{status: http.StatusForbidden, code: "forbidden", description: "Instance metadata is blocked for pods of this node"}
)

// ErrSource means that the caller's address may be another pod's, and that newer data will not
// tell.
var ErrSource = errors.New("its source address cannot be trusted")

// retrySoon is the Retry-After of errors that may be over in a moment.
const retrySoon = time.Second

// asHTTP is what a pod is told of an error. It tells nothing internal: pod, binding and
// address are in the log only.
func asHTTP(err error) *httpError {
	var httpErr *httpError
	var failure *tokencache.Failure
	var tooLong *http.MaxBytesError
	var upstreamErr *upstream.Error
	switch {
	case errors.As(err, &httpErr):
		return httpErr
	case errors.As(err, &tooLong):
		return errTooLarge
	case errors.Is(err, upstream.ErrBodyBudget):
		return errHeld
	case errors.Is(err, upstream.ErrBodyTooLong):
		return errLong
	case errors.Is(err, podresolver.ErrNoIdentity):
		return errNoIdentity
	case errors.Is(err, podresolver.ErrMultipleIdentities):
		return errSeveral
	case errors.Is(err, podresolver.ErrNotAssigned):
		return notYet("The identity is not assigned to the pod yet", 5*time.Second)
	case errors.Is(err, podresolver.ErrServiceAccount):
		return notYet("The service account of the pod is not known yet", retrySoon)
	case errors.Is(err, podresolver.ErrNotSynced):
		return notYet("The agent is not in sync with the API server yet", retrySoon)
	case errors.Is(err, podresolver.ErrStale):
		return notYet("Pod and identity data is stale", 10*time.Second)
	case errors.Is(err, podresolver.ErrUnconfirmed):
		return notYet("The pod of this address is not known yet", retrySoon)
	case errors.Is(err, ErrSource):
		return badRequest("This node's network does not show which pod is calling; ask the operators of the cluster")
	case errors.Is(err, podresolver.ErrUnknownPod):
		return notYet("The pod is not known on this node yet", retrySoon)
	case errors.Is(err, podresolver.ErrUnknownAddress):
		return notYet("The pod of this address is not known yet", retrySoon)
	case errors.Is(err, podresolver.ErrAmbiguousAddress):
		return notYet("The address is claimed by more than one pod", 5*time.Second)
	case errors.Is(err, tokencache.ErrKeyTooLong):
		return badRequest("The resource is too long")
	case errors.As(err, &failure):
		return noToken(failure)
	case errors.As(err, &upstreamErr): // of a request that is passed through
		return notYet("The metadata service is not available", retrySoon)
	default:
		return notYet("The metadata service could not be reached", retrySoon)
	}
}

// Answer describes the response to an error of podresolver, for operators: its status and
// fields.
func Answer(err error) string {
	e := asHTTP(err)
	return fmt.Sprintf("%d %s", e.status, e)
}

// noToken is what a pod is told if the cache has no token: the upstream's own words if they
// are about the request or the identity. What is wrong with a service principal's credential
// is in the log only.
func noToken(f *tokencache.Failure) *httpError {
	var upstreamErr *upstream.Error
	var credential *upstream.CredentialError
	retryAfter := max(f.RetryAfter, retrySoon)
	switch {
	case f.Class == tokencache.Throttled:
		return &httpError{
			status: http.StatusTooManyRequests, code: "invalid_request",
			description: "Temporarily throttled, too many requests", retryAfter: retryAfter,
		}
	case f.Class == tokencache.Refused && errors.As(f, &upstreamErr) && upstreamErr.Code != "":
		return &httpError{status: http.StatusBadRequest, code: upstreamErr.Code, description: upstreamErr.Description}
	case f.Class == tokencache.Refused && errors.As(f, &credential):
		return &httpError{
			status: http.StatusBadRequest, code: "invalid_client",
			description: "The credential of this identity cannot be used; see the log of the node's agent for the reason",
		}
	case f.Class == tokencache.Refused:
		return badRequest("The metadata service refused the request")
	case errors.Is(f, tokencache.ErrBusy):
		return notYet("Token requests on this node are being rate limited", retryAfter)
	case errors.As(f, &credential):
		return notYet("The credential of this identity cannot be read now", retryAfter)
	case errors.Is(f, upstream.ErrEntra), errors.As(f, &upstreamErr) && upstreamErr.Source == "Entra":
		return notYet("Entra is not available", retryAfter)
	case !errors.As(f, &upstreamErr) && errors.Is(f, context.DeadlineExceeded):
		return notYet("The metadata service did not answer in time", retryAfter)
	default:
		return notYet("The metadata service is not available", retryAfter)
	}
}

// refuse writes an error response, and logs and remembers it if an operator may have to act.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	e := asHTTP(err)
	var httpErr *httpError
	switch {
	case r.Context().Err() != nil: // the client has gone, or finished sending
	case errors.As(err, &httpErr): // the client's mistake, and the response has all there is to say
		s.log.DebugContext(r.Context(), "refused", "from", peerOf(r), "method", r.Method, "path", r.URL.Path, "status", e.status, "error", err)
	default:
		s.notServed(r, e.status, err)
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
	r.Header = nil // the client may be slow to read
	writeJSON(w, e.status, body)
}

// notServed logs and remembers a refusal that an operator may have to do something about.
func (s *Server) notServed(r *http.Request, status int, err error) {
	caller, now := callerOf(r), time.Now()
	refusal := Refusal{Status: status, Reason: Reason(err), First: now, Last: now, cause: steady(cut(err.Error()))}
	refusal.Fix = Fix(refusal.Reason)
	if pod := s.podOf(err, caller); pod != nil {
		refusal.Pod = pod.String()
	}
	logged := s.logLimit.allow(caller)
	cause := err
	if logged {
		refusal.Reason, refusal.Fix, err = s.diagnose(err)
		s.log.InfoContext(r.Context(), "not served", "from", peerOf(r), "pod", refusal.Pod, "status", status, "reason", refusal.Reason, "error", err, "fix", refusal.Fix)
	}
	refusal.Text = err.Error()
	count := s.refusals.add(caller, refusal, logged)
	if logged && s.cfg.Refused != nil {
		s.deny(caller, cause, Denial{Reason: refusal.Reason, Fix: refusal.Fix, Count: count})
	}
}
