package telemetry

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podidentity/nmi/proxy/histogram"
	"github.com/podidentity/nmi/proxy/upstream"
)

// legacy exports the metrics of the old NMI under its names and labels (v1.8.17, pkg/metrics),
// for dashboards and alerts that are in use. It had more labels, whose values pods chose:
// namespace and resource, and a raw path for operation_type. Its buckets began at half a second.
type legacy struct{ snapshot func() snapshot }

var (
	legacyRequests = prometheus.NewDesc("aadpodidentity_nmi_operations_duration_seconds",
		"Time from a pod's request to the response", []string{"operation_type", "status_code"}, nil)
	legacyFetches = prometheus.NewDesc("aadpodidentity_imds_operations_duration_seconds",
		"Time that IMDS and Entra take for a token", []string{"operation_type"}, nil)
	legacyFetchErrors = prometheus.NewDesc("aadpodidentity_imds_operations_errors_count",
		"Requests to IMDS and Entra that brought no token", []string{"operation_type"}, nil)
	legacyAPIErrors = prometheus.NewDesc("aadpodidentity_kubernetes_api_operations_errors_count",
		"Requests to the API server that failed", []string{"operation_type"}, nil)
)

// Describe implements prometheus.Collector.
func (legacy) Describe(to chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{legacyRequests, legacyFetches, legacyFetchErrors, legacyAPIErrors} {
		to <- desc
	}
}

// Collect implements prometheus.Collector.
func (l legacy) Collect(to chan<- prometheus.Metric) {
	s := l.snapshot()
	type operation struct {
		route  string
		status int
	}
	requests := make(map[operation]histogram.Snapshot)
	for _, r := range s.server.Requests {
		if r.Route != "" {
			requests[operation{r.Route, r.Status}] = requests[operation{r.Route, r.Status}].Add(r.Duration)
		}
	}
	for of, durations := range requests {
		to <- constHistogram(legacyRequests, durations, of.route, strconv.Itoa(of.status))
	}
	for name, service := range map[string]upstream.ServiceStats{"adal_token_msi_userassignedid": s.upstream.IMDS, "adal_token": s.upstream.Entra} {
		to <- constHistogram(legacyFetches, service.Durations[upstream.OK], name)
		failed := uint64(0)
		for _, durations := range service.Durations[upstream.OK+1:] {
			failed += durations.Count()
		}
		to <- constCounter(legacyFetchErrors, failed, name)
	}
	to <- constCounter(legacyAPIErrors, s.pods.LookupErrors, "get_pod_list")
}

func constHistogram(desc *prometheus.Desc, d histogram.Snapshot, labels ...string) prometheus.Metric {
	buckets := make(map[float64]uint64)
	below := uint64(0)
	for i, bound := range histogram.Bounds() {
		if below += d.Buckets[i]; i >= fastBuckets {
			buckets[bound.Seconds()] = below
		}
	}
	return prometheus.MustNewConstHistogram(desc, d.Count(), d.Sum.Seconds(), buckets, labels...)
}

func constCounter(desc *prometheus.Desc, n uint64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), labels...)
}
