package telemetry

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

func TestLegacyMetrics(t *testing.T) {
	s := everything()
	s.server.Requests = append(s.server.Requests, proxy.RequestStats{
		Method: "GET", Route: "/metadata/identity/oauth2/token", Status: 200, Source: "upstream", Duration: took(2 * time.Second),
	})
	s.upstream.IMDS.Durations[upstream.OK] = took(time.Second)
	s.upstream.IMDS.Durations[upstream.Refused] = took(time.Second)
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(legacy{func() snapshot { return s }}))
	text := scrape(t, registry)
	for _, line := range []string{
		"# TYPE aadpodidentity_nmi_operations_duration_seconds histogram",
		`aadpodidentity_nmi_operations_duration_seconds_count{operation_type="/metadata/identity/oauth2/token",status_code="200"} 2`,
		`aadpodidentity_nmi_operations_duration_seconds_bucket{operation_type="/metadata/identity/oauth2/token",status_code="200",le="1"} 1`,
		`aadpodidentity_imds_operations_duration_seconds_sum{operation_type="adal_token_msi_userassignedid"} 1`,
		"# TYPE aadpodidentity_imds_operations_errors_count counter",
		`aadpodidentity_imds_operations_errors_count{operation_type="adal_token_msi_userassignedid"} 2`,
		`aadpodidentity_imds_operations_errors_count{operation_type="adal_token"} 0`,
		`aadpodidentity_kubernetes_api_operations_errors_count{operation_type="get_pod_list"} 1`,
	} {
		assert.Contains(t, text, line+"\n")
	}
	assert.NotContains(t, text, `status_code="404"`, "a path that is not served")
}
