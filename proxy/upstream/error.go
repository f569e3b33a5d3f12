package upstream

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

// Error is a refusal by the upstream, in its own words, so that Entra's AADSTS
// messages reach the user.
type Error struct {
	Source      string        // who refused: "IMDS" or "Entra"
	Status      int           // HTTP status, never 200
	Code        string        // "invalid_request", "invalid_resource", ...; "" if it gave none
	Description string        // "" if it gave none
	RetryAfter  time.Duration // 0 if it gave none
}

func (e *Error) Error() string {
	source := cmp.Or(e.Source, "IMDS")
	if e.Code == "" {
		return fmt.Sprintf("%s answered %d %s", source, e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("%s answered %d %s: %s", source, e.Status, e.Code, e.Description)
}

// Class says what the refusal means for those who ask again. What Microsoft asks
// clients to try again, and what is not in the service's own words, is Unavailable.
func (e *Error) Class() tokencache.Class {
	switch {
	case e.Status == http.StatusTooManyRequests:
		return tokencache.Throttled
	case e.Status < 400 || e.Status >= 500 || e.Code == "" ||
		e.Status == http.StatusNotFound || e.Status == http.StatusGone || e.Status == http.StatusRequestTimeout,
		e.Code == "temporarily_unavailable", e.Code == "server_error": // RFC 6749, 4.1.2.1
		return tokencache.Unavailable
	default:
		return tokencache.Refused
	}
}

// Wait is how long the upstream wants to be left alone.
func (e *Error) Wait() time.Duration { return e.RetryAfter }

const maxDescription = 2 << 10 // AADSTS messages with trace IDs stay under 1 KB

// newError reads a refusal. A body that is not the service's JSON (a web
// server's HTML, say) is dropped rather than quoted.
func newError(status int, retryAfter string, body []byte, now time.Time) *Error {
	e := &Error{Status: status, RetryAfter: parseRetryAfter(retryAfter, now)}
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
		d = time.Duration(min(n, 3600)) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), time.Hour)
}
