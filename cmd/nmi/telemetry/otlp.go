package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
)

// Nothing is exported by OTLP unless the variables that OpenTelemetry's specification has for
// that ask for it ("OpenTelemetry Environment Variable Specification", "OpenTelemetry Protocol
// Exporter"). newCollector reads those of the collector, and OpenTelemetry's SDK the others:
// intervals, the sampler.

// flushTimeout bounds the last export when the agent stops.
const flushTimeout = 2 * time.Second

// wanted reports whether a signal, TRACES or METRICS, is to be exported by OTLP.
func wanted(signal string) (bool, error) {
	exporters := strings.Split(os.Getenv("OTEL_"+signal+"_EXPORTER"), ",")
	for i := range exporters {
		exporters[i] = strings.TrimSpace(exporters[i])
	}
	switch {
	case strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true"):
		return false, nil
	case slices.Contains(exporters, "otlp"):
	case exporters[0] != "", variable(signal, "ENDPOINT") == "": // the specification would export to localhost
		return false, nil
	}
	// gRPC would make the program a third larger.
	if protocol := variable(signal, "PROTOCOL"); protocol != "" && protocol != "http/protobuf" {
		return false, fmt.Errorf("OTLP over %s is not supported: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, and as endpoint the collector's port for that (4318 by default)", protocol)
	}
	return true, nil
}

// variable is a variable of an exporter: the signal's own, or that of all signals.
func variable(signal, name string) string {
	if value := os.Getenv("OTEL_EXPORTER_OTLP_" + signal + "_" + name); value != "" {
		return value
	}
	return os.Getenv("OTEL_EXPORTER_OTLP_" + name)
}

// PushMetrics exports the metrics by OTLP until stop is called, if the environment asks for it.
func PushMetrics(ctx context.Context, parts Parts, log *slog.Logger) (stop func(), err error) {
	return pushMetrics(ctx, producer{parts.snapshot, time.Now()}, parts.Version, parts.Node, log)
}

func pushMetrics(ctx context.Context, from sdkmetric.Producer, version, node string, log *slog.Logger) (stop func(), err error) {
	nothing := func() {}
	if ok, err := wanted("METRICS"); !ok {
		return nothing, err
	}
	to, err := newCollector("METRICS", version)
	if err != nil {
		return nothing, err
	}
	agent, err := describeAgent(ctx, version, node)
	if err != nil {
		return nothing, err
	}
	logErrors(log)
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithResource(agent), sdkmetric.WithReader(
		sdkmetric.NewPeriodicReader(metricExporter{to}, sdkmetric.WithProducer(from))))
	log.Info("exporting metrics by OTLP", "to", to.url)
	return func() { flush(provider.Shutdown) }, nil
}

// describeAgent says whose metrics and traces these are. OTEL_SERVICE_NAME and
// OTEL_RESOURCE_ATTRIBUTES come on top.
func describeAgent(ctx context.Context, version, node string) (*resource.Resource, error) {
	r, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", "nmi"), attribute.String("service.version", version),
		attribute.String("service.instance.id", node), attribute.String("k8s.node.name", node),
	), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return r, nil
}

func flush(shutdown func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	_ = shutdown(ctx) // the collector may be gone, too
}

// errorInterval is the least time between two warnings: exports are tried all the time.
const errorInterval = time.Minute

// logErrors makes OpenTelemetry's errors, such as a collector that does not answer, warnings in
// the log.
func logErrors(log *slog.Logger) {
	var mu sync.Mutex // guards last
	var last time.Time
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) >= errorInterval {
			last = now
			log.Warn("exporting by OTLP failed; see the variables OTEL_EXPORTER_OTLP_*", "error", err)
		}
	}))
}
