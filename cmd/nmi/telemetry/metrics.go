package telemetry

import (
	"maps"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// metrics makes all metrics, of counts since a time. docs/metrics.md says more of each. Names and
// labels of requests are those of OpenTelemetry's semantic conventions for HTTP. No label has
// more than a few values, whatever pods do: none is a pod, an address, a resource or a raw path.
func (s snapshot) metrics(since, now time.Time) []metricdata.Metrics {
	l := &list{since: since, now: now}
	s.addAgent(l)
	s.addRequests(l)
	s.addUpstream(l)
	s.addTokens(l)
	s.addPods(l)
	s.addRules(l)
	return l.metrics
}

func (s snapshot) addAgent(l *list) {
	l.counter("nmi.events.written", "Kubernetes Events created or updated", of(s.events.Written))
	l.counter("nmi.events.dropped", "Kubernetes Events for which there was no room, no rate or no right", of(s.events.Dropped))
	l.gauge("nmi.ready", "", "1 if the agent is ready, as /readyz says, else 0", oneIf(s.ready))
	l.gauge("nmi.build_info", "", "1 for the version that runs",
		of(1, attribute.String("version", s.version), attribute.String("goversion", s.goVersion)))
}

func (s snapshot) addRequests(l *list) {
	var durations []durations
	for _, r := range s.server.Requests {
		durations = append(durations, spread(r.Duration, requestLabels(r)...))
	}
	l.histogram("http.server.request.duration", "Time from a pod's request to the response", 0, durations...)
	l.counter("nmi.requests.refused", "Requests of pods that were not served, by the reason that logs and Events have, too", by("reason", s.server.Refused)...)
	c := s.server.Connections
	l.gauge("http.server.active_requests", "", "Requests of pods under way", of(c.Busy))
	l.counter("nmi.fast_path.requests", "Requests for tokens that the fast path answered", of(s.server.FastPath))
	l.gauge("nmi.connections.open", "", "Connections that pods have open", of(c.Open))
	l.counter("nmi.connections.refused", "Connections closed on arrival because there were too many", of(c.Refused))
	l.counter("nmi.connections.evicted", "Connections closed to make room for others", of(c.Evicted))
	l.counter("nmi.connections.unidentified", "Connections reset on arrival in mode ebpf because their caller is not known",
		each("reason", s.ruleCounts.Unidentified[:], iptables.Unidentified.String)...)
}

// requestLabels leaves out what is not known, as the semantic conventions have it.
func requestLabels(r proxy.RequestStats) (labels []attribute.KeyValue) {
	if r.Overflow {
		return []attribute.KeyValue{attribute.Bool("otel.metric.overflow", true)}
	}
	for _, label := range []struct{ name, value string }{
		{"http.request.method", r.Method}, {"http.route", r.Route}, {"nmi.source", r.Source},
	} {
		if label.value != "" {
			labels = append(labels, attribute.String(label.name, label.value))
		}
	}
	if r.Status != 0 {
		labels = append(labels, attribute.Int("http.response.status_code", r.Status))
	}
	return labels
}

func (s snapshot) addUpstream(l *list) {
	var requests, waits []durations
	var waiting, inFlight, throttled []point
	for _, service := range []struct {
		source string
		stats  upstream.ServiceStats
	}{{"imds", s.upstream.IMDS}, {"entra", s.upstream.Entra}} {
		source := attribute.String("source", service.source)
		if service.stats.Waits.Count() > 0 { // most nodes never ask Entra
			for outcome, d := range service.stats.Durations {
				requests = append(requests, spread(d, source, attribute.String("outcome", upstream.Outcome(outcome).String())))
			}
			waits = append(waits, spread(service.stats.Waits, source))
		}
		waiting = append(waiting, of(service.stats.Waiting, source))
		inFlight = append(inFlight, of(service.stats.InFlight, source))
		throttled = append(throttled, of(service.stats.Durations[upstream.Throttled].Count(), source))
	}
	l.histogram("nmi.upstream.request.duration", "Time that IMDS and Entra take for a token", fastBuckets, requests...)
	l.histogram("nmi.upstream.wait.duration", "Time that requests to IMDS and Entra wait for the rate limit", fastBuckets, waits...)
	l.gauge("nmi.upstream.waiting", "", "Requests to IMDS and Entra that wait for the rate limit", waiting...)
	l.gauge("nmi.upstream.in_flight", "", "Requests to IMDS and Entra under way", inFlight...)
	l.counter("nmi.upstream.throttled", "Requests that IMDS and Entra answered with 429", throttled...)
	l.gauge("nmi.upstream.available", "", "0 while IMDS gives no tokens, else 1", oneIf(s.upstream.Available))
	l.gauge("nmi.upstream.limits_shared", "", "1 while another agent of the node has half of the limits on requests to IMDS, else 0", oneIf(s.upstream.Shared))
}

func (s snapshot) addTokens(l *list) {
	t := s.tokens
	l.gauge("nmi.cache.tokens", "", "Tokens in memory", of(t.Entries))
	l.gauge("nmi.cache.failing_keys", "", "Keys without a token whose last fetch failed", of(t.Failing))
	l.counter("nmi.cache.hits", "Requests answered from memory, by how fresh the token was",
		by("freshness", map[string]uint64{"fresh": t.Fresh, "due": t.Due, "expiring": t.Expiring})...)
	l.counter("nmi.cache.misses", "Requests for which no valid token was in memory", of(t.Misses))
	l.counter("nmi.cache.joined", "Requests that joined a fetch started by another", of(t.Joined))
	l.counter("nmi.cache.negative_hits", "Requests answered with a failure from memory", of(t.NegativeHits))
	l.counter("nmi.cache.rejections", "Requests refused because their pod asked too fast, or too many fetches were waiting", of(t.Rejections))
	l.counter("nmi.cache.fetches", "Fetches of tokens that were started", each("reason", t.Fetches[:], tokencache.Reason.String)...)
	l.counter("nmi.cache.fetch_failures", "Fetches that brought no token", each("class", t.Failures[:], tokencache.Class.String)...)
	l.counter("nmi.cache.evictions", "Tokens removed from memory to make room for others", of(t.Evictions))
}

func (s snapshot) addPods(l *list) {
	p := s.pods
	p.Resolutions[podresolver.OutcomeFound] += s.server.FastPath // see ResolveNow
	l.counter("nmi.pods.resolutions", "Times that the pod of a request's address was asked for", each("outcome", p.Resolutions[:], podresolver.Outcome.String)...)
	l.counter("nmi.pods.wait.seconds", "Time that requests waited for their pods to be known, in vain or not", of(p.WaitTime.Seconds()))
	l.gauge("nmi.pods.addresses", "", "Addresses that pods of this node have", of(p.Addresses))
	l.counter("nmi.pods.ambiguous_addresses", "Times that an address came to have more than one owner", of(p.Ambiguous))
	l.counter("nmi.pods.lookups", "Lookups of an address's pod at the API server",
		by("result", map[string]uint64{"found": p.Found, "error": p.LookupErrors, "absent": p.Lookups - p.Found - p.LookupErrors})...)
	var staleness []point
	for _, w := range p.Watches {
		staleness = append(staleness, of(w.StaleFor.Seconds(), attribute.String("resource", w.Resource)))
	}
	l.gauge("nmi.watch.staleness", "s", "Time since the API server last sent something about a resource; it does so about once a minute", staleness...)
	l.gauge("nmi.sources.withheld", "", "1 if tokens are withheld because pods on a bridge can take each other's addresses, else 0", oneIf(s.withheld))
	l.counter("nmi.sources.refused", "Times a source address was refused because it may belong to another pod by now", of(s.sourcesRefused))
}

func (s snapshot) addRules(l *list) {
	inPlace := make(map[string]int)
	for part, is := range s.rules.InPlace {
		inPlace[part] = 0
		if is {
			inPlace[part] = 1
		}
	}
	l.gauge("nmi.rules.in_place", "", "1 if a part of the rules was in place after the last check, else 0", by("component", inPlace)...)
	if s.rules.Mode != "" {
		l.gauge("nmi.rules.info", "", "1 for the redirect mode and the iptables backend in use",
			of(1, attribute.String("mode", string(s.rules.Mode)), attribute.String("backend", string(s.rules.Backend))))
	}
	c := s.ruleCounts
	l.counter("nmi.rules.checks", "Checks of the rules", of(c.Checks))
	l.counter("nmi.rules.repairs", "Times the rules were written because they were missing or changed, the first included", of(c.Repairs))
	l.counter("nmi.rules.lost", "Times a part of the rules had been in place and was found missing or changed", by("component", c.Lost)...)
	l.counter("nmi.rules.errors", "Times a part of the rules could not be read or written", each("cause", c.Errors[:], iptables.Cause.String)...)
	l.counter("nmi.rules.lock_waits", "iptables commands that had to wait for the xtables lock", of(c.LockContended))
	l.counter("nmi.rules.stale_flows_cut", "Connections that bypassed the agent and were cut", of(c.StaleFlows))
}

// by returns a point for each value of a label, in the order of the values.
func by[N number](label string, counts map[string]N) (points []point) {
	for _, value := range slices.Sorted(maps.Keys(counts)) {
		points = append(points, of(counts[value], attribute.String(label, value)))
	}
	return points
}

// each returns a point for each value of an enumeration, of which counts has one each.
func each[E ~int](label string, counts []uint64, name func(E) string) (points []point) {
	for i, n := range counts {
		points = append(points, of(n, attribute.String(label, name(E(i)))))
	}
	return points
}
