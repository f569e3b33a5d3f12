package telemetry

import (
	"maps"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/podidentity/nmi/tokencache"
)

const seconds = "s"

// metrics makes all metrics, of counts since a time. docs/metrics.md says more of each.
func (s snapshot) metrics(since, now time.Time) []metricdata.Metrics {
	l := &list{since: since, now: now}
	s.addRules(l)
	s.addSources(l)
	s.addPods(l)
	s.addServer(l)
	s.addUpstream(l)
	s.addTokens(l)
	return l.metrics
}

func (s snapshot) addRules(l *list) {
	if s.rules.Mode != "" {
		l.gauge("redirect.mode", "", "1 for the redirect mode in force", of(1, attribute.String("mode", string(s.rules.Mode))))
	}
	l.gauge("iptables.in_place", "", "1 if all required rules, iptables' and policy routing's, were in place at the last check, else 0", oneIf(s.rules.Err == nil))
	l.counter("iptables.checks", "Checks of the rules", of(s.ruleCounts.Checks))
	l.counter("iptables.repairs", "Times the rules were written because they were missing or changed, the first included", of(s.ruleCounts.Repairs))
	l.counter("rules.lost", "Times rules that had been in place were found missing or changed", by("part", s.ruleCounts.Lost)...)
	l.counter("iptables.lock_contended", "iptables commands that had to wait for the xtables lock", of(s.ruleCounts.LockContended))
	l.counter("connections.cut", "Connections that bypassed the agent and were cut", of(s.ruleCounts.StaleFlows))
}

func (s snapshot) addSources(l *list) {
	l.gauge("source.unguarded", "", "1 if tokens are withheld because pods on a bridge can take each other's addresses, else 0", oneIf(s.withheld))
	l.counter("sources.refused", "Times a source address was refused because it may belong to another pod by now", of(s.sourcesRefused))
}

func (s snapshot) addPods(l *list) {
	var silence []point
	for _, w := range s.pods.Watches {
		silence = append(silence, of(w.StaleFor.Seconds(), attribute.String("resource", w.Resource)))
	}
	l.gauge("watch.silence", seconds, "Time since the API server last sent something about a resource; it does so about once a minute", silence...)
	l.gauge("addresses", "", "Addresses that pods of this node hold", of(s.pods.Addresses))
	l.counter("addresses.ambiguous", "Times an address came to have more than one owner", of(s.pods.Ambiguous))
	l.counter("lookups", "Lookups of an address's pod at the API server", of(s.pods.Lookups))
	l.counter("lookups.found", "Lookups that found a pod the watch had not reported", of(s.pods.Found))
}

func (s snapshot) addServer(l *list) {
	l.gauge("connections", "", "Connections that pods have open", of(s.server.Connections.Open))
	l.counter("fast_path.requests", "Requests for tokens that the fast path answered", of(s.server.FastPath))
	l.counter("connections.refused", "Connections closed on arrival because there were too many", of(s.server.Connections.Refused))
	l.counter("connections.ended", "Connections closed in favour of others", of(s.server.Connections.Evicted))
}

func (s snapshot) addUpstream(l *list) {
	l.gauge("imds.unavailable", "", "1 while IMDS gives no tokens, else 0", oneIf(!s.upstream.Available))
	l.gauge("imds.shared", "", "1 while another agent of the node has half of the limits on requests to IMDS, else 0", oneIf(s.upstream.Shared))
}

func (s snapshot) addTokens(l *list) {
	t := s.tokens
	l.counter("token.hits", "Requests answered from memory, by how fresh the token was",
		by("freshness", map[string]uint64{"fresh": t.Fresh, "due": t.Due, "expiring": t.Expiring})...)
	l.counter("token.misses", "Requests for which no valid token was in memory", of(t.Misses))
	l.counter("token.joined", "Requests that joined a fetch started by another", of(t.Joined))
	l.counter("token.remembered_failures", "Requests answered with a failure from memory", of(t.NegativeHits))
	l.counter("token.turned_away", "Requests refused because their pod asked too fast, or too many fetches from IMDS or Entra were waiting", of(t.Rejections))
	l.counter("token.fetches", "Fetches from IMDS or Entra, refreshes included", of(t.Fetches[tokencache.Miss]+t.Fetches[tokencache.Refresh]+t.Fetches[tokencache.Renewal]))
	l.counter("token.refreshes", "Fetches to replace a token that was still valid", of(t.Fetches[tokencache.Refresh]))
	l.counter("token.renewals", "Fetches of a new token in place of the one in memory, for a request", of(t.Fetches[tokencache.Renewal]))
	l.counter("token.evictions", "Tokens evicted from memory for others", of(t.Evictions))
	var failures []point
	for class, n := range t.Failures {
		failures = append(failures, of(n, attribute.String("class", tokencache.Class(class).String())))
	}
	l.counter("token.fetch_failures", "Failed fetches, by class", failures...)
	l.gauge("tokens", "", "Tokens in memory", of(t.Entries))
	l.gauge("tokens.failing", "", "Keys whose last fetch failed", of(t.Failing))
}

// by returns a point for each value of a label.
func by[N number](label string, counts map[string]N) (points []point) {
	for _, value := range slices.Sorted(maps.Keys(counts)) {
		points = append(points, of(counts[value], attribute.String(label, value)))
	}
	return points
}
