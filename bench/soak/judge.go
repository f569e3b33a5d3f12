package main

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// verdict is what an answer is worth.
type verdict int

const (
	right       verdict = iota // a token of an identity that the pod is entitled to
	denied                     // 400, rightly
	throttled                  // 429: IMDS throttles, the token is not in memory, and the pod is told
	unavailable                // 503: IMDS fails likewise, or the pod's object is not known yet
	wrong                      // anything else
	lost                       // no answer, or a part of one
	verdicts
)

func (v verdict) String() string {
	return [...]string{"right", "denied, rightly", "throttled (429)", "told to come back (503)", "wrong", "lost"}[v]
}

// request is what a pod asks for.
type request struct {
	resource string
	foreign  string // client ID of an identity that the pod is never entitled to; "" asks for the pod's own
	given    string // whose token for the resource it was given a moment ago, one that is still good; "" for none
}

// answer is what it gets. err is that of the connection.
type answer struct {
	status     int
	retryAfter string
	body       body
	err        error
}

type body struct {
	Token     string `json:"access_token"`
	Resource  string `json:"resource"`
	ExpiresOn int64  `json:"expires_on,string"`
}

// judge compares an answer with what the pod was entitled to between sending the request and
// this moment, now.
func judge(asked request, got answer, entitled []string, now time.Time) (verdict, string) {
	switch {
	case got.err != nil:
		return lost, got.err.Error()
	case got.status == http.StatusOK:
		subject := imdstest.Subject(got.body.Token)
		switch {
		case asked.foreign != "":
			return wrong, fmt.Sprintf("a token of %q for a pod that named %s, and is entitled to %q", subject, asked.foreign, entitled)
		case subject == none || !slices.Contains(entitled, subject):
			return wrong, fmt.Sprintf("a token of %q for a pod that is entitled to %q", subject, entitled)
		case got.body.Resource != asked.resource:
			return wrong, fmt.Sprintf("a token for %q instead of %q", got.body.Resource, asked.resource)
		case got.body.ExpiresOn <= now.Unix():
			return wrong, fmt.Sprintf("a token that expired at %s", time.Unix(got.body.ExpiresOn, 0))
		}
		return right, ""
	case got.status == http.StatusBadRequest:
		if asked.foreign == "" && !slices.Contains(entitled, none) {
			return wrong, fmt.Sprintf("refused, and is entitled to %q", entitled)
		}
		return denied, ""
	case asked.foreign == "" && asked.given != "" && len(entitled) == 1 && entitled[0] == asked.given:
		return wrong, fmt.Sprintf("status %d, although it was given such a token a moment ago", got.status)
	case got.retryAfter == "":
		return wrong, fmt.Sprintf("status %d without Retry-After", got.status)
	case got.status == http.StatusTooManyRequests:
		return throttled, ""
	case got.status == http.StatusServiceUnavailable:
		return unavailable, ""
	default:
		return wrong, fmt.Sprintf("status %d", got.status)
	}
}
