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

// goneWait is how long IMDS is left alone after it has answered 410 to all tries of
// a fetch. It is back within 70 s (Microsoft, "How to use managed identities on an
// Azure VM to acquire an access token", Retry guidance), mostly sooner. With Retry-After: 5
// and a fetch's own patience, clients that come back five times outlast that.
const goneWait = 5 * time.Second

// Error is an upstream's answer other than a token, in its own words, so that
// Entra's AADSTS messages reach the user.
type Error struct {
	Source      string        // who answered: "IMDS", "Entra"
	Status      int           // HTTP status, never 200
	Code        string        // "invalid_request", "invalid_resource", ...; "" if it gave none
	Description string        // "" if it gave none
	RetryAfter  time.Duration // 0 if it gave none

	empty bool   // the answer had no body
	asked string // method and path; "" for the agent's own requests for tokens
}

func (e *Error) Error() string {
	if e.Source == sourceIMDS && e.byProxy() {
		return fmt.Sprintf("a proxy before IMDS answered %d (%s); if this node has the Metadata Security Protocol (GuestProxyAgent), "+
			"allow this agent's process %s in the InVMAccessControlProfile for IMDS", e.Status, http.StatusText(e.Status), cmp.Or(e.asked, "GET "+tokenPath))
	}
	if e.Code == "" {
		return fmt.Sprintf("%s answered %d %s", e.Source, e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("%s answered %d %s: %s", e.Source, e.Status, e.Code, e.Description)
}

// Class says what the answer means for those who ask again; tokencache looks for
// it.
func (e *Error) Class() tokencache.Class {
	switch {
	case e.Status == http.StatusTooManyRequests:
		return tokencache.Throttled
	case e.Status < 400, passes(e.Status), e.byProxy(),
		e.Code == "temporarily_unavailable", e.Code == "server_error": // RFC 6749, 4.1.2.1
		return tokencache.Unavailable
	case e.Code == "" && e.Source != sourceIMDS:
		// Not Entra's own words: somebody's on the way to it.
		return tokencache.Unavailable
	default:
		return tokencache.Refused
	}
}

// byProxy reports whether the answer is that of a metadata security proxy on the way, and
// says nothing of the identity. Azure's GuestProxyAgent, which takes over connections to
// IMDS on nodes with the Metadata Security Protocol, answers 403 without a body to what
// its rules do not allow, and 421 where it has lost whose the connection is. IMDS itself
// gives reasons in JSON, and never answers 421.
func (e *Error) byProxy() bool {
	return e.Status == http.StatusMisdirectedRequest || e.Status == http.StatusForbidden && e.empty
}

// UnknownIdentity reports whether IMDS says that the node has no such identity.
func (e *Error) UnknownIdentity() bool {
	return e.Source == sourceIMDS && e.Status == http.StatusBadRequest && strings.EqualFold(e.Description, "Identity not found")
}

// Wait is how long the upstream wants to be left alone, 0 if that is up to the
// caller; tokencache looks for it.
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

// passes reports whether a status is one of those that Microsoft asks clients to try
// again after (same page, Error handling), or the one that HTTP does (RFC 9110,
// section 15.5.9). 429 is among Microsoft's, but not here: the callers are told to
// wait instead, so that a throttled service is left alone.
func passes(status int) bool {
	switch status {
	case http.StatusNotFound, http.StatusRequestTimeout, http.StatusGone:
		return true
	default:
		return status >= 500
	}
}

const maxDescription = 2 << 10 // AADSTS messages with trace IDs stay under 1 KB

// newError reads an answer other than a token; its Source is the caller's to set. A
// body that is not the service's JSON (a web server's HTML, say) is dropped rather
// than quoted.
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

// parseRetryAfter reads both forms of RFC 9110, section 10.2.3, and believes at
// most an hour.
func parseRetryAfter(value string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.Atoi(value); err == nil {
		d = time.Duration(min(max(n, 0), 3600)) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}
