// Package telemetry exports what the parts of the agent count. They know nothing of
// OpenTelemetry: each has one snapshot of plain numbers.
//
// The life of a scrape:
//
//  1. Prometheus asks for /metrics, see Handler.
//  2. The producer reads the snapshot of each part once.
//  3. It makes the data points of all metrics from them, see metrics.go.
//  4. The exporter writes them in Prometheus's format.
//
// An exporter for OTLP does the same in intervals, see PushMetrics, and Traces makes a span for each
// fetch of a token, if the environment asks for that.
package telemetry

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/instrumentation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/podidentity/nmi/cmd/nmi/events"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// Parts are the parts of the agent, all of them required.
type Parts struct {
	Rules    *iptables.Reconciler
	Links    *links.Tracker
	Pods     *podresolver.Resolver
	Upstream *upstream.Upstream
	Tokens   *tokencache.Cache
	Server   *proxy.Server
	Events   *events.Writer

	Ready   func() error // nil if the agent is
	Version string       // of the agent
	Node    string       // its name
	Legacy  bool         // export the old NMI's metrics, too
}

// Handler serves /metrics in Prometheus's format. docs/metrics.md lists them. An agent
// without metrics is better than none: if they cannot be made, the page says why.
func Handler(parts Parts) http.Handler {
	registry, err := newRegistry(producer{parts.snapshot, time.Now()})
	if err == nil && parts.Legacy {
		err = registry.Register(legacy{parts.snapshot})
	}
	if err != nil {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		})
	}
	return handlerOf(registry)
}

func handlerOf(registry *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		Registry:           registry,
		DisableCompression: true, // a compressor takes 0.8 MiB for each request at once, to make 30 KiB less
	}))
	return mux
}

func newRegistry(from sdkmetric.Producer) (*prometheus.Registry, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprometheus.New(
		otelprometheus.WithRegisterer(registry),
		otelprometheus.WithProducer(from),
		otelprometheus.WithoutScopeInfo(),
		otelprometheus.WithoutTargetInfo(),
	)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter)) // a reader collects only once it has a provider
	return registry, nil
}

// producer makes metrics from the parts' snapshots.
type producer struct {
	snapshot func() snapshot
	since    time.Time // what counters count from
}

// Produce implements sdkmetric.Producer.
func (p producer) Produce(context.Context) ([]metricdata.ScopeMetrics, error) {
	return []metricdata.ScopeMetrics{{
		Scope:   instrumentation.Scope{Name: "github.com/podidentity/nmi"},
		Metrics: p.snapshot().metrics(p.since, time.Now()),
	}}, nil
}
