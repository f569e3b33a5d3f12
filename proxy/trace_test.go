package proxy

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/podidentity/nmi/tokencache"
)

// A fetch knows the spans of the requests that wait for it.
func TestTracedRequest(t *testing.T) {
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	traced := make(chan []trace.SpanContext, 1)
	w := newWorld(t, func(c *Config) {
		c.Tokens = tokencache.New(func(_ context.Context, req tokencache.Request) (*tokencache.Token, error) {
			waiting, spans := req.Requests()
			assert.Equal(t, 1, waiting)
			traced <- spans
			return &tokencache.Token{AccessToken: "t", ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
		}, tokencache.Config{})
		t.Cleanup(c.Tokens.Close)
		c.Trace = func(ctx context.Context, header http.Header) context.Context {
			if header.Get("traceparent") == "mine" {
				return trace.ContextWithSpanContext(ctx, span)
			}
			return ctx
		}
	})
	resp, _ := w.send(bound, request("GET", tokenURL, "Metadata: true", "traceparent: mine"))
	require.Equal(t, http.StatusOK, resp.StatusCode)
	assert.Equal(t, []trace.SpanContext{span}, <-traced)
	resp, _ = w.send(bound, request("GET", tokenURL+"other", "Metadata: true"))
	require.Equal(t, http.StatusOK, resp.StatusCode)
	assert.Empty(t, <-traced)
}
