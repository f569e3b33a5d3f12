package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// metrics serves /metrics in Prometheus's format. docs/metrics.md lists them. An agent
// without metrics is better than none: if they cannot be made, the page says why.
func metrics(rules *iptables.Reconciler, tracker *links.Tracker, resolver *podresolver.Resolver, source *upstream.Upstream, tokens *tokencache.Cache, server *proxy.Server) http.Handler {
	registry, err := newRegistry(rules, tracker, resolver, source, tokens, server)
	if err != nil {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		})
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		Registry:           registry,
		DisableCompression: true, // a compressor takes 0.8 MiB for each request at once, to make 30 KiB less
	}))
	return mux
}

func newRegistry(rules *iptables.Reconciler, tracker *links.Tracker, resolver *podresolver.Resolver, source *upstream.Upstream, tokens *tokencache.Cache, server *proxy.Server) (*prometheus.Registry, error) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprometheus.New(
		otelprometheus.WithRegisterer(registry),
		otelprometheus.WithNamespace("nmi"),
		otelprometheus.WithoutScopeInfo(),
		otelprometheus.WithoutTargetInfo(),
	)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter)).Meter("nmi")
	if err := errors.Join(observeRules(meter, rules), observeSources(meter, tracker), observeResolver(meter, resolver), observeTokens(meter, tokens), observeServer(meter, server), observeIMDS(meter, source)); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return registry, nil
}

// observeRules exports the state of the rules.
func observeRules(meter metric.Meter, rules *iptables.Reconciler) error {
	var all error
	status := func(name, description string, observe func(iptables.Status, metric.Int64Observer)) {
		_, err := meter.Int64ObservableGauge(name, metric.WithDescription(description),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				observe(rules.Status(), o)
				return nil
			}))
		all = errors.Join(all, err)
	}
	status("redirect.mode", "1 for the redirect mode in force", func(s iptables.Status, o metric.Int64Observer) {
		if s.Mode != "" {
			o.Observe(1, metric.WithAttributes(attribute.String("mode", string(s.Mode))))
		}
	})
	status("iptables.in_place", "1 if all required rules, iptables' and policy routing's, were in place at the last check, else 0", func(s iptables.Status, o metric.Int64Observer) {
		o.Observe(oneIf(s.Err == nil))
	})
	counter := func(name, description string, value func(iptables.Stats) uint64) {
		all = errors.Join(all, count(meter, name, description, func() uint64 { return value(rules.Stats()) }))
	}
	counter("iptables.checks", "Checks of the rules", func(s iptables.Stats) uint64 { return s.Checks })
	counter("iptables.repairs", "Times the rules were written because they were missing or changed, the first included", func(s iptables.Stats) uint64 { return s.Repairs })
	_, err := meter.Int64ObservableCounter("rules.lost", metric.WithDescription("Times rules that had been in place were found missing or changed"),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for part, n := range rules.Stats().Lost {
				o.Observe(int64(n), metric.WithAttributes(attribute.String("part", part))) //nolint:gosec // never that many
			}
			return nil
		}))
	all = errors.Join(all, err)
	counter("iptables.lock_contended", "iptables commands that had to wait for the xtables lock", func(s iptables.Stats) uint64 { return s.LockContended })
	counter("connections.cut", "Connections that bypassed the agent and were cut", func(s iptables.Stats) uint64 { return s.StaleFlows })
	return all
}

// observeSources exports whether callers can be told by their addresses.
func observeSources(meter metric.Meter, tracker *links.Tracker) error {
	_, err := meter.Int64ObservableGauge("source.unguarded", metric.WithDescription("1 if tokens are withheld because pods on a bridge can take each other's addresses, else 0"),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(oneIf(tracker.Status().Unguarded != nil))
			return nil
		}))
	return errors.Join(err, count(meter, "sources.refused", "Times a source address was refused because it may belong to another pod by now", func() uint64 { return tracker.Stats().Refused }))
}

// observeResolver exports what is known of pods, and how recent it is.
func observeResolver(meter metric.Meter, resolver *podresolver.Resolver) error {
	var all error
	_, err := meter.Float64ObservableGauge("watch.silence", metric.WithUnit("s"),
		metric.WithDescription("Time since the API server last sent something about a resource; it does so about once a minute"),
		metric.WithFloat64Callback(func(_ context.Context, o metric.Float64Observer) error {
			for _, w := range resolver.Stats().Watches {
				o.Observe(w.StaleFor.Seconds(), metric.WithAttributes(attribute.String("resource", w.Resource)))
			}
			return nil
		}))
	all = errors.Join(all, err, gauge(meter, "addresses", "Addresses that pods of this node hold", func() int { return resolver.Stats().Addresses }))
	counter := func(name, description string, value func(podresolver.Stats) uint64) {
		all = errors.Join(all, count(meter, name, description, func() uint64 { return value(resolver.Stats()) }))
	}
	counter("addresses.ambiguous", "Times an address came to have more than one owner", func(s podresolver.Stats) uint64 { return s.Ambiguous })
	counter("lookups", "Lookups of an address's pod at the API server", func(s podresolver.Stats) uint64 { return s.Lookups })
	counter("lookups.found", "Lookups that found a pod the watch had not reported", func(s podresolver.Stats) uint64 { return s.Found })
	return all
}

// observeServer exports the counts of pods' connections.
func observeServer(meter metric.Meter, server *proxy.Server) error {
	return errors.Join(
		gauge(meter, "connections", "Connections that pods have open", func() int { return server.Connections().Open }),
		count(meter, "fast_path.requests", "Requests for tokens that the fast path answered", server.FastPathRequests),
		count(meter, "connections.refused", "Connections closed on arrival because there were too many", func() uint64 { return server.Connections().Refused }),
		count(meter, "connections.ended", "Connections closed in favour of others", func() uint64 { return server.Connections().Evicted }))
}

// observeIMDS exports whether IMDS answers, and whether all of its limits are this agent's.
func observeIMDS(meter metric.Meter, source *upstream.Upstream) error {
	flag := func(name, description string, is func() bool) error {
		return gauge(meter, name, description, func() int { return int(oneIf(is())) })
	}
	return errors.Join(
		flag("imds.unavailable", "1 while IMDS gives no tokens, else 0", func() bool { return source.Unavailable() != nil }),
		flag("imds.shared", "1 while another agent of the node has half of the limits on requests to IMDS, else 0", source.Shared))
}

// observeTokens exports the counts of the cache and of its fetches.
func observeTokens(meter metric.Meter, tokens *tokencache.Cache) error {
	var all error
	counter := func(name, description string, value func(tokencache.Stats) uint64) {
		all = errors.Join(all, count(meter, name, description, func() uint64 { return value(tokens.Stats()) }))
	}
	labelled := func(name, description, label string, values func(tokencache.Stats) map[string]uint64) {
		_, err := meter.Int64ObservableCounter(name, metric.WithDescription(description),
			metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
				for of, n := range values(tokens.Stats()) {
					o.Observe(int64(n), metric.WithAttributes(attribute.String(label, of))) // 10,000 a second fill it in 29 million years
				}
				return nil
			}))
		all = errors.Join(all, err)
	}
	labelled("token.hits", "Requests answered from memory, by how fresh the token was", "freshness", func(s tokencache.Stats) map[string]uint64 {
		return map[string]uint64{"fresh": s.Fresh, "due": s.Due, "expiring": s.Expiring}
	})
	counter("token.misses", "Requests for which no valid token was in memory", func(s tokencache.Stats) uint64 { return s.Misses })
	counter("token.joined", "Requests that joined a fetch started by another", func(s tokencache.Stats) uint64 { return s.Joined })
	counter("token.remembered_failures", "Requests answered with a failure from memory", func(s tokencache.Stats) uint64 { return s.NegativeHits })
	counter("token.turned_away", "Requests refused because their pod asked too fast, or too many fetches from IMDS or Entra were waiting", func(s tokencache.Stats) uint64 { return s.TurnedAway })
	counter("token.fetches", "Fetches from IMDS or Entra, refreshes included", func(s tokencache.Stats) uint64 { return s.Fetches })
	counter("token.refreshes", "Fetches to replace a token that was still valid", func(s tokencache.Stats) uint64 { return s.Refreshes })
	counter("token.renewals", "Requests for a new token in place of the one in memory", func(s tokencache.Stats) uint64 { return s.Renewals })
	counter("token.evictions", "Tokens evicted from memory for others", func(s tokencache.Stats) uint64 { return s.Evictions })
	labelled("token.fetch_failures", "Failed fetches, by class", "class", func(s tokencache.Stats) map[string]uint64 {
		byClass := make(map[string]uint64, len(s.Failures))
		for class, n := range s.Failures {
			byClass[tokencache.Class(class).String()] = n
		}
		return byClass
	})
	return errors.Join(all,
		gauge(meter, "tokens", "Tokens in memory", func() int { return tokens.Stats().Entries }),
		gauge(meter, "tokens.failing", "Keys whose last fetch failed", func() int { return tokens.Stats().Failing }))
}

// count adds a counter whose value is kept elsewhere.
func count(meter metric.Meter, name, description string, value func() uint64) error {
	_, err := meter.Int64ObservableCounter(name, metric.WithDescription(description),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(int64(value())) // what is counted happens some times a second at most
			return nil
		}))
	return err
}

// gauge adds a gauge whose value is kept elsewhere.
func gauge(meter metric.Meter, name, description string, value func() int) error {
	_, err := meter.Int64ObservableGauge(name, metric.WithDescription(description),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			o.Observe(int64(value()))
			return nil
		}))
	return err
}

func oneIf(yes bool) int64 {
	if yes {
		return 1
	}
	return 0
}
