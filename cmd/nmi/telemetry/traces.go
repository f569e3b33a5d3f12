package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/podidentity/nmi/tokencache"
)

// Bounds of what traces take while the collector does not answer: 256 spans of some 6 KiB.
const (
	maxSpans = 256
	maxBatch = 64
	maxLinks = 32
)

// maxAttribute bounds a resource, which pods choose, in bytes.
const maxAttribute = 256

// Traces exports a span for each fetch of a token. nil traces nothing.
type Traces struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// NewTraces returns the exporter of traces by OTLP; nil if the environment does not ask for it.
func NewTraces(ctx context.Context, version, node string, log *slog.Logger) (*Traces, error) {
	if ok, err := wanted("TRACES"); !ok {
		return nil, err
	}
	to, err := newCollector("TRACES", version)
	if err != nil {
		return nil, err
	}
	exporter, err := otlptrace.New(ctx, traceClient{to})
	if err != nil {
		return nil, fmt.Errorf("exporting traces by OTLP: %w", err)
	}
	from, err := describeAgent(ctx, version, node)
	if err != nil {
		return nil, err
	}
	logErrors(log)
	limits := sdktrace.NewSpanLimits()
	limits.LinkCountLimit = maxLinks
	limits.AttributeValueLengthLimit = maxAttribute
	provider := sdktrace.NewTracerProvider(sdktrace.WithResource(from), sdktrace.WithRawSpanLimits(limits),
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(maxSpans), sdktrace.WithMaxExportBatchSize(maxBatch)))
	log.Info("exporting traces by OTLP", "to", to.url)
	return &Traces{provider, provider.Tracer("github.com/podidentity/nmi")}, nil
}

// traceClient is an otlptrace.Client.
type traceClient struct{ *collector }

func (traceClient) Start(context.Context) error { return nil }

func (c traceClient) Stop(context.Context) error {
	c.close()
	return nil
}

func (c traceClient) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	// TracesData has the encoding of ExportTraceServiceRequest, whose package has gRPC in it.
	return c.send(ctx, &tracepb.TracesData{ResourceSpans: spans})
}

// Close exports what is left.
func (t *Traces) Close() {
	if t != nil {
		flush(t.provider.Shutdown)
	}
}

// Context is for proxy.Config.Trace, if t is not nil: it returns ctx with the span that a request
// is part of by its header traceparent (W3C, "Trace Context"). What tracestate says is for
// programs that know its vendor, and would have no bound worth the name.
func (t *Traces) Context(ctx context.Context, header http.Header) context.Context {
	parent := header.Get("Traceparent")
	if parent == "" {
		return ctx
	}
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": parent})
}

// Fetch returns a Fetch like next that has a span. The request that started the fetch is its
// parent, and so decides whether it is sampled, unless OTEL_TRACES_SAMPLER says otherwise. It has
// links to the others that wait for it.
func (t *Traces) Fetch(next tokencache.Fetch) tokencache.Fetch {
	if t == nil {
		return next
	}
	return func(ctx context.Context, req tokencache.Request) (*tokencache.Token, error) {
		parents := 0
		if _, traced := req.Requests(); len(traced) > 0 {
			ctx = trace.ContextWithRemoteSpanContext(ctx, traced[0])
			parents = 1
		}
		source := "imds"
		if _, ok := req.FromEntra(); ok {
			source = "entra"
		}
		ctx, span := t.tracer.Start(ctx, "fetch token", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
			attribute.String("nmi.upstream", source), attribute.String("nmi.client_id", req.ClientID), attribute.String("nmi.resource", req.Resource)))
		defer span.End()
		token, err := next(ctx, req)
		waiting, traced := req.Requests() // more may have come meanwhile
		for _, request := range traced[parents:] {
			span.AddLink(trace.Link{SpanContext: request})
		}
		span.SetAttributes(attribute.Int("nmi.waiting_requests", waiting))
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		return token, err
	}
}
