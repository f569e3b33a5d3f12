package telemetry

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/histogram"
	"github.com/podidentity/nmi/proxy/upstream"
)

// took is a histogram of one duration.
func took(d time.Duration) histogram.Snapshot {
	var h histogram.Histogram
	h.Record(d)
	return h.Snapshot()
}

// everything is a snapshot that makes each metric, with each of its labels.
func everything() snapshot {
	s := snapshot{
		rules:      iptables.Status{Mode: iptables.Redirect, Backend: iptables.NFT, InPlace: map[string]bool{"redirect": true, "guard": false}},
		ruleCounts: iptables.Stats{Lost: map[string]uint64{"redirect": 1}},
		pods:       podresolver.Stats{Watches: []podresolver.Watch{{Resource: "pods", StaleFor: time.Second}}, Lookups: 6, Found: 2, LookupErrors: 1},
		server: proxy.Stats{FastPath: 3, Refused: map[string]uint64{"NoIdentityBound": 2, "Throttled": 0}, Requests: []proxy.RequestStats{
			{Method: "GET", Route: "/metadata/identity/oauth2/token", Status: 200, Source: "memory", Duration: took(70 * time.Microsecond)},
			{Method: "GET", Status: 404, Duration: took(time.Millisecond)},
			{Overflow: true, Duration: took(time.Second)},
		}},
		version: "v1.2.3", goVersion: "go1.26",
	}
	s.pods.Resolutions[podresolver.OutcomeFound] = 4
	s.upstream.IMDS.Waits = took(time.Microsecond)
	s.upstream.IMDS.Durations[upstream.Throttled] = took(80 * time.Millisecond)
	return s
}

// gather returns what Prometheus gets of a snapshot.
func gather(t *testing.T, s snapshot) map[string]*dto.MetricFamily {
	t.Helper()
	registry, err := newRegistry(producer{func() snapshot { return s }, time.Now()})
	require.NoError(t, err)
	families, err := registry.Gather()
	require.NoError(t, err)
	byName := make(map[string]*dto.MetricFamily)
	for _, family := range families {
		byName[family.GetName()] = family
	}
	return byName
}

// describe returns a row of docs/metrics.md but for its last cell.
func describe(family *dto.MetricFamily) string {
	var labels []string
	for _, metric := range family.GetMetric() {
		for _, label := range metric.GetLabel() {
			labels = append(labels, "`"+label.GetName()+"`")
		}
	}
	slices.Sort(labels)
	labels = slices.Compact(labels)
	kind := strings.ToLower(family.GetType().String())
	switch len(labels) {
	case 0:
	case 1:
		kind += ", label " + labels[0]
	default:
		kind += ", labels " + strings.Join(labels, ", ")
	}
	return fmt.Sprintf("| `%s` | %s |", family.GetName(), kind)
}

// TestMetricsDoc compares docs/metrics.md with the metrics: their names, types and labels.
func TestMetricsDoc(t *testing.T) {
	page, err := os.ReadFile("../../../docs/metrics.md")
	require.NoError(t, err)
	var metrics []string
	for name, family := range gather(t, everything()) {
		if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && name != "promhttp_metric_handler_errors_total" {
			assert.NotEmpty(t, family.GetHelp(), name)
			metrics = append(metrics, describe(family))
		}
	}
	slices.Sort(metrics)
	documented := regexp.MustCompile("(?m)^\\| `[^|]* \\| (?:gauge|counter|histogram)[^|]* \\|").FindAllString(string(page), -1)
	slices.Sort(documented)
	assert.Equal(t, metrics, documented)
}

// page returns /metrics of a snapshot.
func page(t *testing.T, s snapshot) string {
	t.Helper()
	registry, err := newRegistry(producer{func() snapshot { return s }, time.Now()})
	require.NoError(t, err)
	return scrape(t, registry)
}

func scrape(t *testing.T, registry *prometheus.Registry) string {
	t.Helper()
	w := httptest.NewRecorder()
	handlerOf(registry).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code)
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	text := page(t, everything())
	for _, line := range []string{
		`http_server_request_duration_seconds_bucket{http_request_method="GET",http_response_status_code="200",http_route="/metadata/identity/oauth2/token",nmi_source="memory",le="5e-05"} 0`,
		`http_server_request_duration_seconds_bucket{http_request_method="GET",http_response_status_code="200",http_route="/metadata/identity/oauth2/token",nmi_source="memory",le="0.0001"} 1`,
		`http_server_request_duration_seconds_count{http_request_method="GET",http_response_status_code="404"} 1`,
		`http_server_request_duration_seconds_sum{otel_metric_overflow="true"} 1`,
		`nmi_requests_refused_total{reason="NoIdentityBound"} 2`,
		`nmi_requests_refused_total{reason="Throttled"} 0`,
		`nmi_upstream_request_duration_seconds_bucket{outcome="throttled",source="imds",le="0.05"} 0`,
		`nmi_upstream_request_duration_seconds_bucket{outcome="throttled",source="imds",le="0.1"} 1`,
		`nmi_upstream_request_duration_seconds_count{outcome="ok",source="imds"} 0`,
		`nmi_upstream_wait_duration_seconds_bucket{source="imds",le="0.01"} 1`,
		`nmi_upstream_throttled_total{source="imds"} 1`,
		`nmi_upstream_throttled_total{source="entra"} 0`,
		`nmi_pods_resolutions_total{outcome="found"} 7`,
		`nmi_pods_resolutions_total{outcome="not_synced"} 0`,
		`nmi_pods_lookups_total{result="absent"} 3`,
		`nmi_rules_in_place{component="redirect"} 1`,
		`nmi_rules_in_place{component="guard"} 0`,
		`nmi_rules_info{backend="nft",mode="redirect"} 1`,
		`nmi_rules_errors_total{cause="permission"} 0`,
		`nmi_cache_fetches_total{reason="renewal"} 0`,
		`nmi_build_info{goversion="go1.26",version="v1.2.3"} 1`,
		`nmi_ready 0`,
	} {
		assert.Contains(t, text, "\n"+line+"\n")
	}
	assert.NotContains(t, text, `nmi_upstream_request_duration_seconds_count{outcome="ok",source="entra"}`, "it was not asked")
	assert.NotContains(t, text, `le="0.001",source`, "nothing upstream is that fast")
}

// The memory that the metrics port can take follows from the size of the page, see
// page_server.go in cmd/nmi.
func TestPageIsBounded(t *testing.T) {
	s := everything()
	s.server.Requests = nil
	for i := range proxy.MaxKinds {
		s.server.Requests = append(s.server.Requests, proxy.RequestStats{
			Method: "_OTHER", Route: "/metadata/identity/oauth2/token", Status: 100 + i, Source: "refreshing", Duration: took(time.Second),
		})
	}
	assert.Less(t, len(page(t, s)), 105<<10)
	assert.Less(t, len(page(t, everything())), 45<<10)
}
