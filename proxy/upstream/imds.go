package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/podidentity/nmi/tokencache"
)

const (
	tokenPath  = "/metadata/identity/oauth2/token"
	apiVersion = "2018-02-01"

	// maxRetryDelay is the longest pause between two tries. A Retry-After that is
	// longer ends the fetch, and is for its callers to keep.
	maxRetryDelay = 2 * time.Second
)

// newPipeline returns the azcore pipeline that asks IMDS for tokens, until the
// request's ctx ends.
func newPipeline(transport *http.Transport) runtime.Pipeline {
	return runtime.NewPipeline("nmi", "", runtime.PipelineOptions{PerRetry: []policy.Policy{perTry{}}}, &policy.ClientOptions{
		Transport: wholeAnswers{transport},
		Telemetry: policy.TelemetryOptions{Disabled: true},
		Retry: policy.RetryOptions{
			MaxRetries:    1000, // ctx ends them
			TryTimeout:    0,    // see perTry
			RetryDelay:    200 * time.Millisecond,
			MaxRetryDelay: maxRetryDelay,
			ShouldRetry: func(resp *http.Response, err error) bool {
				return err != nil || retriable(resp.StatusCode)
			},
		},
	})
}

// Token fetches one token; the signature is tokencache.Fetch. The fetch waits for its
// first slot as long as req.Waiting says, and then has fetchTimeout for all its tries, each
// of which takes a slot (those at Entra share one). An answer other than a token, by IMDS
// or Entra, is an *Error, wrapped where the deadline ended the tries after it.
func (u *Upstream) Token(ctx context.Context, req tokencache.Request) (token *tokencache.Token, err error) {
	principal, ok := req.FromEntra()
	counts := &u.imdsCounts
	if ok {
		counts = &u.entraCounts
	}
	ctx, f := newFetch(ctx, u.imdsLimiter, counts, req) // Entra's has one for each authority
	defer f.end()
	if ok {
		token, err = u.entra.token(ctx, f, req.Key, principal)
	} else {
		token, err = u.imdsToken(ctx, f, req)
	}
	if err != nil && errors.Is(context.Cause(ctx), errFetchTimeout) && !errors.Is(err, errFetchTimeout) {
		return nil, fmt.Errorf("%w: %w", errFetchTimeout, err)
	}
	return token, err
}

// imdsToken fetches the token of a managed identity.
func (u *Upstream) imdsToken(ctx context.Context, f *fetch, ask tokencache.Request) (*tokencache.Token, error) {
	key := ask.Key
	req, err := runtime.NewRequest(ctx, http.MethodGet, u.base.JoinPath(tokenPath).String())
	if err != nil {
		return nil, fmt.Errorf("request for IMDS: %w", err)
	}
	query := url.Values{"api-version": {apiVersion}, "resource": {key.Resource}}
	switch {
	case key.ClientID != "":
		query.Set("client_id", key.ClientID)
	case key.ResourceID != "":
		query.Set("msi_res_id", key.ResourceID)
	default:
		// IMDS would answer with the node's own identity.
		return nil, fmt.Errorf("token key names no identity: %s", key)
	}
	if ask.Fresh {
		query.Set("bypass_cache", "true")
	}
	req.Raw().URL.RawQuery = query.Encode()
	req.Raw().Header.Set("Metadata", "true")
	req.Raw().Header.Set("User-Agent", u.userAgent)
	req.SetOperationValue(f)

	resp, err := u.pipeline.Do(req)
	// If Close ended the fetch, only a failed try before says anything about IMDS.
	if closed := errors.Is(context.Cause(ctx), context.Canceled); f.tries > 0 && (f.last != nil || !closed) {
		u.outage.record(f.began, outageCause(resp, err, f))
	}
	switch {
	case err != nil && f.last != nil && !errors.Is(err, f.last):
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		// What is wrong comes first, and without the URL: long texts are cut at their end.
		return nil, fmt.Errorf("asking IMDS for a token: after %d tries, the last of which failed: %w (%w)", f.tries, causeOf(f.last), err)
	case err != nil:
		return nil, fmt.Errorf("asking IMDS for a token: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, f.last
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("reading IMDS's answer: %w", err)
	}
	token, err := parseToken(body, key, time.Now())
	if err != nil {
		return nil, fmt.Errorf("IMDS's answer cannot be used: %w", err)
	}
	if token.Resource != key.Resource {
		u.spellings.log(key.Resource, token.Resource)
	}
	return token, nil
}
