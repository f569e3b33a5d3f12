package upstream

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// Error is a refusal by the upstream, in its own words, so that Entra's AADSTS
// messages reach the user.
type Error struct {
	Status      int           // HTTP status, never 200
	Code        string        // "invalid_request", "invalid_resource", ...; "" if it gave none
	Description string        // "" if it gave none
	RetryAfter  time.Duration // 0 if it gave none
}

func (e *Error) Error() string {
	if e.Code == "" {
		return fmt.Sprintf("IMDS answered %d %s", e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("IMDS answered %d %s: %s", e.Status, e.Code, e.Description)
}

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
