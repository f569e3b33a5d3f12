package upstream

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

// sourceIMDS is Error.Source for IMDS.
const sourceIMDS = "IMDS"

// goneWait is the back-off after IMDS has answered 410 to all tries of a fetch. It is
// back within 70 s (Microsoft, "How to use managed identities on an Azure VM to acquire an
// access token", Retry guidance), usually sooner. With Retry-After: 5 and the duration of a
// fetch, clients that retry five times wait longer than that.
const goneWait = 5 * time.Second

// Error is an upstream's answer other than a token. It keeps the upstream's words, so that
// Entra's AADSTS messages reach the user.
type Error struct {
	Source      string        // who answered: "IMDS" or "Entra"
	Status      int           // HTTP status, never 200
	Code        string        // "invalid_request", "invalid_resource", ...; "" for none
	Description string        // "" for none
	RetryAfter  time.Duration // 0 for none

	empty   bool   // the answer had no body
	request string // method and path; "" for the agent's own requests for tokens
}

func (e *Error) Error() string {
	if e.Source == sourceIMDS && e.byProxy() {
		return fmt.Sprintf("a proxy before IMDS answered %d (%s); if this node has the Metadata Security Protocol (GuestProxyAgent), "+
			"allow this agent's process %s in the InVMAccessControlProfile for IMDS", e.Status, http.StatusText(e.Status), cmp.Or(e.request, "GET "+tokenPath))
	}
	if e.Code == "" {
		return fmt.Sprintf("%s answered %d %s", e.Source, e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("%s answered %d %s: %s", e.Source, e.Status, e.Code, e.Description)
}

// Class says whether a retry may help. tokencache reads it.
func (e *Error) Class() tokencache.Class {
	switch {
	case e.Status == http.StatusTooManyRequests:
		return tokencache.Throttled
	case e.Status < 400, retriable(e.Status), e.byProxy(),
		e.Code == "temporarily_unavailable", e.Code == "server_error": // RFC 6749, 4.1.2.1
		return tokencache.Unavailable
	case e.Code == "" && e.Source != sourceIMDS:
		// Not from Entra, but from a proxy on the way.
		return tokencache.Unavailable
	default:
		return tokencache.Refused
	}
}

// byProxy reports whether a metadata security proxy answered instead of IMDS; then the
// answer says nothing about the identity. Azure's GuestProxyAgent, which intercepts
// connections to IMDS on nodes with the Metadata Security Protocol, answers 403 without a
// body to requests that its rules do not allow, and 421 if it no longer knows which process
// a connection belongs to. IMDS itself gives reasons in JSON, and never answers 421.
func (e *Error) byProxy() bool {
	return e.Status == http.StatusMisdirectedRequest || e.Status == http.StatusForbidden && e.empty
}

// UnknownIdentity reports whether IMDS says that the node has no such identity.
func (e *Error) UnknownIdentity() bool {
	return e.Source == sourceIMDS && e.Status == http.StatusBadRequest && strings.EqualFold(e.Description, "Identity not found")
}

// Wait returns how long to wait before a retry; 0 leaves it to the caller. tokencache reads
// it.
func (e *Error) Wait() time.Duration {
	switch {
	case e.RetryAfter > 0:
		return e.RetryAfter
	case e.Status == http.StatusTooManyRequests:
		return time.Second
	case e.Status == http.StatusGone:
		return goneWait
	default:
		return 0
	}
}

// retriable reports whether a fetch retries after a status: those that Microsoft asks
// clients to retry (same page, Error handling), and 408 (RFC 9110, section 15.5.9). 429 is
// one of Microsoft's, but not retried here: callers are told to wait, and a throttled
// service gets no more requests meanwhile.
func retriable(status int) bool {
	switch status {
	case http.StatusNotFound, http.StatusRequestTimeout, http.StatusGone:
		return true
	default:
		return status >= 500
	}
}

const maxDescription = 2 << 10 // AADSTS messages with trace IDs stay under 1 KB

// newError parses an answer other than a token. The caller sets Source. A body that is not
// the service's JSON, such as a web server's HTML, is dropped.
func newError(status int, retryAfter string, body []byte, now time.Time) *Error {
	e := &Error{Status: status, RetryAfter: parseRetryAfter(retryAfter, now), empty: len(bytes.TrimSpace(body)) == 0}
	var in struct {
		Code        string `json:"error"`
		Description string `json:"error_description"`
	}
	if json.Unmarshal(body, &in) == nil && len(in.Code) <= 100 && len(in.Description) <= maxDescription {
		e.Code, e.Description = in.Code, in.Description
	}
	return e
}

// parseRetryAfter parses both forms of Retry-After (RFC 9110, section 10.2.3). The result is
// an hour at most.
func parseRetryAfter(value string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.Atoi(value); err == nil {
		d = time.Duration(min(max(n, 0), 3600)) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}
