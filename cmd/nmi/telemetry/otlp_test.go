package telemetry

import (
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/podidentity/nmi/tokencache"
)

// received is what a collector was sent.
type received struct {
	mu      sync.Mutex // guards all below
	headers http.Header
	metrics []*metricspb.Metric
	spans   []*tracepb.Span
	agent   []*commonpb.KeyValue
}

// startCollector starts a collector, and sets OTEL_EXPORTER_OTLP_ENDPOINT. It answers the first
// requests with the given statuses.
func startCollector(t *testing.T, statuses ...int) *received {
	t.Helper()
	got := &received{}
	var requests atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := int(requests.Add(1)); n <= len(statuses) {
			w.WriteHeader(statuses[n-1])
			return
		}
		assert.Equal(t, "application/x-protobuf", r.Header.Get("Content-Type"))
		body := io.Reader(r.Body)
		if r.Header.Get("Content-Encoding") == "gzip" {
			var err error
			body, err = gzip.NewReader(r.Body)
			assert.NoError(t, err)
		}
		raw, err := io.ReadAll(body)
		assert.NoError(t, err)
		got.mu.Lock()
		defer got.mu.Unlock()
		got.headers = r.Header
		switch r.URL.Path {
		case "/v1/traces":
			var traces tracepb.TracesData
			assert.NoError(t, proto.Unmarshal(raw, &traces))
			for _, of := range traces.GetResourceSpans() {
				got.agent = of.GetResource().GetAttributes()
				for _, in := range of.GetScopeSpans() {
					got.spans = append(got.spans, in.GetSpans()...)
				}
			}
		case "/v1/metrics":
			var metrics metricspb.MetricsData
			assert.NoError(t, proto.Unmarshal(raw, &metrics))
			for _, of := range metrics.GetResourceMetrics() {
				got.agent = of.GetResource().GetAttributes()
				for _, in := range of.GetScopeMetrics() {
					got.metrics = append(got.metrics, in.GetMetrics()...)
				}
			}
		default:
			assert.Fail(t, "another path", r.URL.Path)
		}
	}))
	t.Cleanup(srv.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	return got
}

// valuesOf returns attributes by their names.
func valuesOf(attributes []*commonpb.KeyValue) map[string]any {
	values := make(map[string]any)
	for _, a := range attributes {
		switch value := a.GetValue().GetValue().(type) {
		case *commonpb.AnyValue_StringValue:
			values[a.GetKey()] = value.StringValue
		case *commonpb.AnyValue_IntValue:
			values[a.GetKey()] = int(value.IntValue)
		case *commonpb.AnyValue_BoolValue:
			values[a.GetKey()] = value.BoolValue
		}
	}
	return values
}

var discard = slog.New(slog.DiscardHandler)

func TestPushMetrics(t *testing.T) {
	got := startCollector(t, http.StatusServiceUnavailable) // it is sent again after a second
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x, b=c")
	t.Setenv("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.cluster.name=prod")
	stop, err := pushMetrics(t.Context(), producer{everything, time.Now()}, "v1.2.3", "node1", discard)
	require.NoError(t, err)
	stop()
	assert.Equal(t, "Bearer x", got.headers.Get("Authorization"))
	assert.Equal(t, "c", got.headers.Get("B"))
	agent := valuesOf(got.agent)
	for name, want := range map[string]string{"service.name": "nmi", "service.version": "v1.2.3", "k8s.node.name": "node1", "k8s.cluster.name": "prod"} {
		assert.Equal(t, want, agent[name])
	}
	byName := make(map[string]*metricspb.Metric)
	for _, m := range got.metrics {
		byName[m.GetName()] = m
	}
	assert.Len(t, byName, len(everything().metrics(time.Now(), time.Now())))
	assert.InDelta(t, 3, byName["nmi.fast_path.requests"].GetSum().GetDataPoints()[0].GetAsDouble(), 0)
	assert.True(t, byName["nmi.fast_path.requests"].GetSum().GetIsMonotonic())
	assert.Equal(t, "pods", valuesOf(byName["nmi.watch.staleness"].GetGauge().GetDataPoints()[0].GetAttributes())["resource"])
	requests := byName["http.server.request.duration"].GetHistogram().GetDataPoints()
	require.Len(t, requests, 3)
	assert.Equal(t, map[string]any{
		"http.request.method": "GET", "http.route": "/metadata/identity/oauth2/token", "http.response.status_code": 200, "nmi.source": "memory",
	}, valuesOf(requests[0].GetAttributes()))
	assert.Len(t, requests[0].GetBucketCounts(), len(requests[0].GetExplicitBounds())+1)
	assert.Equal(t, uint64(1), requests[0].GetBucketCounts()[1])
	assert.InDelta(t, 70e-6, requests[0].GetSum(), 1e-9)
}

const (
	first     = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	second    = "00-1bf7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"
	unsampled = "00-2bf7651916cd43dd8448eb211c80319c-c7ad6b7169203331-00"
)

// fetchFor has requests with these values of traceparent ask for one token.
func fetchFor(t *testing.T, failure error, traceparents ...string) {
	t.Helper()
	traces, err := NewTraces(t.Context(), "v1.2.3", "node1", discard)
	require.NoError(t, err)
	require.NotNil(t, traces)
	fetching, end := make(chan struct{}), make(chan struct{})
	cache := tokencache.New(traces.Fetch(func(context.Context, tokencache.Request) (*tokencache.Token, error) {
		close(fetching)
		<-end
		return &tokencache.Token{AccessToken: "t", ExpiresOn: time.Now().Add(24 * time.Hour)}, failure
	}), tokencache.Config{})
	var asking sync.WaitGroup
	for i, traceparent := range traceparents {
		header := http.Header{}
		if traceparent != "" {
			header.Set("traceparent", traceparent)
			header.Set("tracestate", "a=b")
		}
		asking.Go(func() {
			_, err := cache.Get(traces.Context(context.Background(), header), tokencache.Key{ClientID: "c1", Resource: "r"}, netip.Addr{})
			assert.Equal(t, failure == nil, err == nil, err)
		})
		<-fetching
		require.Eventually(t, func() bool { return cache.Stats().Joined == uint64(i) }, 30*time.Second, time.Millisecond)
	}
	close(end)
	asking.Wait()
	cache.Close()
	traces.Close()
}

func TestTraceOfASharedFetch(t *testing.T) {
	got := startCollector(t)
	fetchFor(t, nil, first, second, "", unsampled, "malformed")
	require.Len(t, got.spans, 1)
	span := got.spans[0]
	assert.Equal(t, "fetch token", span.GetName())
	assert.Equal(t, []byte{0x0a, 0xf7, 0x65, 0x19}, span.GetTraceId()[:4], "the first request's trace")
	assert.Equal(t, []byte{0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31}, span.GetParentSpanId())
	assert.Empty(t, span.GetTraceState())
	require.Len(t, span.GetLinks(), 2)
	assert.Equal(t, byte(0x1b), span.GetLinks()[0].GetTraceId()[0])
	assert.Equal(t, map[string]any{"nmi.upstream": "imds", "nmi.client_id": "c1", "nmi.resource": "r", "nmi.waiting_requests": 5}, valuesOf(span.GetAttributes()))
	assert.NotEqual(t, tracepb.Status_STATUS_CODE_ERROR, span.GetStatus().GetCode())
	assert.Equal(t, "node1", valuesOf(got.agent)["k8s.node.name"])
}

func TestTraceOfAFailedFetch(t *testing.T) {
	got := startCollector(t)
	fetchFor(t, errors.New("IMDS is down"), "")
	require.Len(t, got.spans, 1)
	assert.Empty(t, got.spans[0].GetParentSpanId(), "no request is traced")
	assert.Equal(t, tracepb.Status_STATUS_CODE_ERROR, got.spans[0].GetStatus().GetCode())
	assert.Equal(t, "IMDS is down", got.spans[0].GetStatus().GetMessage())
}

func TestTracesAreSampledByParent(t *testing.T) {
	got := startCollector(t)
	fetchFor(t, nil, unsampled, first)
	assert.Empty(t, got.spans)
}

func TestNoTraces(t *testing.T) {
	traces, err := NewTraces(t.Context(), "v1.2.3", "node1", discard)
	require.NoError(t, err)
	assert.Nil(t, traces)
	fetch := traces.Fetch(func(ctx context.Context, _ tokencache.Request) (*tokencache.Token, error) { return nil, ctx.Err() })
	assert.Zero(t, testing.AllocsPerRun(100, func() { _, _ = fetch(t.Context(), tokencache.Request{}) }), "there is nothing around it")
	traces.Close()
	stop, err := PushMetrics(t.Context(), Parts{}, discard)
	require.NoError(t, err)
	stop()
}

func TestEnvironment(t *testing.T) {
	for name, tc := range map[string]struct {
		env  map[string]string
		want bool
		err  string
	}{
		"nothing":              {},
		"an endpoint":          {env: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, want: true},
		"its own endpoint":     {env: map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, want: true},
		"another's endpoint":   {env: map[string]string{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}},
		"otlp":                 {env: map[string]string{"OTEL_TRACES_EXPORTER": "console, otlp"}, want: true},
		"none":                 {env: map[string]string{"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}},
		"disabled":             {env: map[string]string{"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}},
		"gRPC":                 {env: map[string]string{"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, err: "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"},
		"gRPC for metrics":     {env: map[string]string{"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}, want: true},
		"protobuf for itself":  {env: map[string]string{"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, want: true},
		"gRPC, and not wanted": {env: map[string]string{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}},
	} {
		t.Run(name, func(t *testing.T) {
			for name, value := range tc.env {
				t.Setenv(name, value)
			}
			got, err := wanted("TRACES")
			assert.Equal(t, tc.want, got)
			if tc.err == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tc.err)
			}
		})
	}
}

func TestUnusableEnvironment(t *testing.T) {
	for name, values := range map[string][]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT":    {"collector:4318", "ftp://x", "http://"},
		"OTEL_EXPORTER_OTLP_HEADERS":     {"a=%zz"},
		"OTEL_EXPORTER_OTLP_TIMEOUT":     {"10s", "0"},
		"OTEL_EXPORTER_OTLP_CERTIFICATE": {"/nowhere", "otlp_test.go"},
	} {
		for _, value := range values {
			t.Run(name+"="+value, func(t *testing.T) {
				t.Setenv(name, value)
				_, err := newCollector("TRACES", "v1.2.3")
				require.ErrorContains(t, err, name)
				assert.NotContains(t, err.Error(), "%zz", "it may be a secret")
			})
		}
	}
}

func TestCollectorEndpoint(t *testing.T) {
	for _, tc := range []struct{ all, own, want string }{
		{"", "", "http://localhost:4318/v1/traces"},
		{"https://x:1/a/", "", "https://x:1/a/v1/traces"},
		{"http://x", "http://y/own", "http://y/own"},
	} {
		t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", tc.all)
		t.Setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", tc.own)
		c, err := newCollector("TRACES", "v1.2.3")
		require.NoError(t, err)
		assert.Equal(t, tc.want, c.url)
	}
}

// What the collector refuses is not sent again.
func TestCollectorRefuses(t *testing.T) {
	got := startCollector(t, http.StatusBadRequest)
	c, err := newCollector("TRACES", "v1.2.3")
	require.NoError(t, err)
	require.ErrorContains(t, c.send(t.Context(), &tracepb.TracesData{}), "answered 400 Bad Request")
	require.NoError(t, c.send(t.Context(), &tracepb.TracesData{}))
	assert.NotNil(t, got.headers)
}
