package monitoring

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	promQL = parser.NewParser(parser.Options{})
	// targetLabels are added to what is scraped, by the chart's ServiceMonitor.
	targetLabels = []string{"job", "node", "pod", "instance", "namespace"}
	// openLabels have values that one short test does not show: they depend on what pods ask.
	openLabels = []string{"http_response_status_code", "http_route", "nmi_source", "le"}
)

// metrics has the labels of each metric, and their values.
type metrics map[string]map[string][]string

// served returns the metrics of an agent that has served traffic. TestSeries of deploy/e2e writes
// the file, and checks it.
func served(t *testing.T) metrics {
	t.Helper()
	text, err := os.ReadFile("testdata/series.txt")
	require.NoError(t, err)
	all := metrics{"up": {}}
	for line := range strings.Lines(string(text)) {
		series, err := promQL.ParseMetric(strings.TrimSpace(line))
		require.NoError(t, err, line)
		name := series.Get(model.MetricNameLabel)
		if all[name] == nil {
			all[name] = make(map[string][]string)
		}
		series.Range(func(l labels.Label) {
			if l.Name != model.MetricNameLabel {
				all[name][l.Name] = append(all[name][l.Name], l.Value)
			}
		})
	}
	return all
}

// check parses a query and looks up the names in it. It returns the labels that its metrics have.
func (m metrics) check(query string) (has []string, err error) {
	parsed, err := promQL.ParseExpr(query)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", query, err)
	}
	has = slices.Clone(targetLabels)
	for _, selector := range parser.ExtractSelectors(parsed) {
		names, err := m.checkSelector(selector)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", query, err)
		}
		has = append(has, names...)
	}
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		var used []string
		switch node := node.(type) {
		case *parser.AggregateExpr:
			used = node.Grouping
		case *parser.BinaryExpr:
			if node.VectorMatching != nil {
				used = append(used, node.VectorMatching.MatchingLabels...)
				used = append(used, node.VectorMatching.Include...)
			}
		}
		for _, label := range used {
			if !slices.Contains(has, label) {
				err = fmt.Errorf("%s: no metric in it has the label %s", query, label)
			}
		}
		return nil
	})
	return has, err
}

func (m metrics) checkSelector(selector []*labels.Matcher) (names []string, err error) {
	var name string
	var ours bool
	for _, matcher := range selector {
		switch matcher.Name {
		case model.MetricNameLabel:
			name = matcher.Value
		case "job":
			ours = matcher.String() == `job="nmi"`
		}
	}
	metric, known := m[name]
	if !known {
		return nil, fmt.Errorf("no agent has a metric %q", name)
	}
	if !ours {
		return nil, fmt.Errorf(`%s without job="nmi"`, name)
	}
	for _, matcher := range selector {
		if matcher.Name == model.MetricNameLabel || slices.Contains(targetLabels, matcher.Name) {
			continue
		}
		if metric[matcher.Name] == nil {
			return nil, fmt.Errorf("%s has no label %s", name, matcher.Name)
		}
		if slices.Contains(openLabels, matcher.Name) {
			continue
		}
		for value := range strings.SplitSeq(matcher.Value, "|") {
			if !slices.Contains(metric[matcher.Name], value) {
				return nil, fmt.Errorf("%s has no value %q of %s", name, value, matcher.Name)
			}
		}
	}
	for label := range metric {
		names = append(names, label)
	}
	return names, nil
}

// TestWrongQueries: what the check is for.
func TestWrongQueries(t *testing.T) {
	known := served(t)
	for query, says := range map[string]string{
		`nmi_ready{job="nmi"`:                     "unexpected end of input",
		`nmi_redy{job="nmi"}`:                     `no agent has a metric "nmi_redy"`,
		`nmi_ready`:                               `nmi_ready without job="nmi"`,
		`nmi_ready{job="nmi", component="guard"}`: "nmi_ready has no label component",
		`nmi_rules_in_place{job="nmi", component=~"fence|input"}`: `nmi_rules_in_place has no value "fence" of component`,
		`sum by (component) (nmi_ready{job="nmi"})`:               "no metric in it has the label component",
	} {
		_, err := known.check(query)
		require.Error(t, err, query)
		assert.Contains(t, err.Error(), says)
	}
	_, err := known.check(`sum by (node, component) (nmi_rules_in_place{job="nmi", component=~"guard|input"})`)
	assert.NoError(t, err)
}
