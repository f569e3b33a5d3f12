package telemetry

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
)

// everything is a snapshot that makes each metric.
func everything() snapshot {
	return snapshot{
		rules:      iptables.Status{Mode: iptables.Redirect},
		ruleCounts: iptables.Stats{Lost: map[string]uint64{"redirect": 1}},
		pods:       podresolver.Stats{Watches: []podresolver.Watch{{Resource: "pods", StaleFor: time.Second}}},
	}
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
	for _, label := range family.GetMetric()[0].GetLabel() {
		labels = append(labels, "`"+label.GetName()+"`")
	}
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
	documented := regexp.MustCompile("(?m)^\\| `[^|]* \\| [^|]* \\|").FindAllString(string(page), -1)
	slices.Sort(documented)
	assert.Equal(t, metrics, documented)
}
