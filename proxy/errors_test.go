package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// What SDKs do next follows from the status: they give up on 400, and come back on
// 503.
func TestErrorResponses(t *testing.T) {
	for name, tc := range map[string]struct {
		err        error
		status     int
		retryAfter time.Duration
	}{
		"no identity":            {podresolver.ErrNoIdentity, 400, 0},
		"several, none named":    {podresolver.ErrMultipleIdentities, 400, 0},
		"a doubtful address":     {ErrSource, 400, 0},
		"unconfirmed":            {podresolver.ErrUnconfirmed, 503, time.Second},
		"not assigned yet":       {podresolver.ErrNotAssigned, 503, 5 * time.Second},
		"not in sync":            {podresolver.ErrNotSynced, 503, time.Second},
		"not known yet":          {podresolver.ErrUnknownAddress, 503, time.Second},
		"claimed twice":          {podresolver.ErrAmbiguousAddress, 503, 5 * time.Second},
		"known for too long":     {podresolver.ErrStale, 503, 10 * time.Second},
		"upstream took too long": {context.DeadlineExceeded, 503, time.Second},
		"anything else":          {errors.New("disk full"), 503, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			got := asHTTP(fmt.Errorf("pod shop/cart-0: %w", tc.err))
			assert.Equal(t, tc.status, got.status)
			assert.Equal(t, tc.retryAfter, got.retryAfter)
			assert.NotContains(t, got.Error(), "cart-0", "pods are told nothing of pods")
		})
	}
}

// What the cache says of a token that cannot be had.
func TestFailureResponses(t *testing.T) {
	for name, tc := range map[string]struct {
		class  tokencache.Class
		err    error
		status int
		text   string
	}{
		"IMDS's own words":      {tokencache.Refused, &upstream.Error{Source: "IMDS", Status: 400, Code: "invalid_request", Description: "Identity not found"}, 400, "invalid_request: Identity not found"},
		"IMDS without words":    {tokencache.Refused, &upstream.Error{Source: "IMDS", Status: 403}, 400, "invalid_request: The metadata service refused the request"},
		"IMDS fails":            {tokencache.Unavailable, &upstream.Error{Source: "IMDS", Status: 500, Code: "x", Description: "10.0.0.1"}, 503, "temporarily_unavailable: The metadata service is not available"},
		"a proxy before IMDS":   {tokencache.Unavailable, &upstream.Error{Source: "IMDS", Status: 421}, 503, "temporarily_unavailable: The metadata service is not available"},
		"Entra fails":           {tokencache.Unavailable, &upstream.Error{Source: "Entra", Status: 500}, 503, "temporarily_unavailable: Entra is not available"},
		"a fetch takes long":    {tokencache.Unavailable, context.DeadlineExceeded, 503, "temporarily_unavailable: The metadata service did not answer in time"},
		"a panic":               {tokencache.Unavailable, errors.New("fetching a token panicked: secret"), 503, "temporarily_unavailable: The metadata service is not available"},
		"more than there is":    {tokencache.Throttled, tokencache.ErrBusy, 429, "invalid_request: Temporarily throttled, too many requests"},
		"others ask for it all": {tokencache.Unavailable, tokencache.ErrBusy, 503, "temporarily_unavailable: Token requests on this node are being rate limited"},
		"IMDS fails all along":  {tokencache.Unavailable, fmt.Errorf("%w: %w", context.DeadlineExceeded, &upstream.Error{Source: "IMDS", Status: 500}), 503, "temporarily_unavailable: The metadata service is not available"},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, tokenURL, nil)
			err := fmt.Errorf("pod shop/cart-0: %w", &tokencache.Failure{Class: tc.class, RetryAfter: 1200 * time.Millisecond, Err: tc.err})
			New(Config{Pods: newResolver(t, podresolver.Config{}), Logger: slog.New(slog.DiscardHandler)}).refuse(w, r, err)
			assert.Equal(t, tc.status, w.Code)
			assert.Equal(t, tc.text, asHTTP(err).Error())
			after := "2" // not before the upstream is asked again
			if tc.status == 400 {
				after = ""
			}
			assert.Equal(t, after, w.Header().Get("Retry-After"))
		})
	}
	assert.Equal(t, time.Second, noToken(&tokencache.Failure{Class: tokencache.Throttled, Err: tokencache.ErrBusy}).retryAfter, "never at once")
}
