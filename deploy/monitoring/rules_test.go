// Package monitoring tests the dashboard and the alerts in this directory with Prometheus's own parser
// and promtool. It is a module of its own, so that the product's go.sum stays small.
package monitoring

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// runbook is the page of the repository that Chart.yaml and the boot guard's unit name, too.
const runbook = "https://github.com/podidentity/nmi/blob/main/docs/runbook.md#"

func alerts(t *testing.T) (all []rulefmt.Rule) {
	t.Helper()
	groups, errs := rulefmt.ParseFile("rules.yaml", false, model.UTF8Validation, promQL, slog.New(slog.DiscardHandler))
	require.Empty(t, errs)
	for _, group := range groups.Groups {
		all = append(all, group.Rules...)
	}
	require.NotEmpty(t, all)
	return all
}

var templateLabel = regexp.MustCompile(`\$labels\.(\w+)`)

// TestAlerts: names that exist, and all that who is woken up needs.
func TestAlerts(t *testing.T) {
	known := served(t)
	page, err := os.ReadFile("../../docs/runbook.md")
	require.NoError(t, err)
	sections := strings.Split(string(page), "\n### ")[1:]
	all := alerts(t)
	assert.Len(t, sections, len(all), "docs/runbook.md has a section for each alert")
	for i, alert := range all {
		assert.Regexp(t, "^Nmi[A-Z]", alert.Alert)
		assert.Contains(t, []string{"critical", "warning", "info"}, alert.Labels["severity"], alert.Alert)
		has, err := known.check(alert.Expr)
		assert.NoError(t, err, alert.Alert)
		for _, annotation := range []string{"summary", "description"} {
			text := alert.Annotations[annotation]
			assert.Regexp(t, `\.$`, strings.TrimSpace(text), "%s: %s", alert.Alert, annotation)
			for _, label := range templateLabel.FindAllStringSubmatch(text, -1) {
				assert.Contains(t, has, label[1], "%s: %s", alert.Alert, text)
			}
		}
		assert.Equal(t, runbook+strings.ToLower(alert.Alert), alert.Annotations["runbook_url"])
		if i < len(sections) {
			name, section, _ := strings.Cut(sections[i], "\n")
			assert.Equal(t, alert.Alert, name, "the order of rules.yaml")
			for _, part := range []string{"Meaning", "Impact", "Diagnosis", "Mitigation"} {
				assert.Contains(t, section, "**"+part+".** ", alert.Alert)
			}
		}
	}
}

// TestPromtool runs promtool's own tests. Each alert has one in which it does not fire at first, and
// then does.
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		promtool, err = exec.LookPath("../../.cache/bin/promtool")
	}
	require.NoError(t, err, "make promtool takes it from Debian's package of Prometheus")
	for _, args := range [][]string{{"check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"}, {"test", "rules", "testdata/rules_test.yaml"}} {
		out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	text, err := os.ReadFile("testdata/rules_test.yaml")
	require.NoError(t, err)
	for _, alert := range alerts(t) {
		_, test, found := bytes.Cut(text, []byte("- name: "+alert.Alert+"\n"))
		require.True(t, found, "%s has no test", alert.Alert)
		test, _, _ = bytes.Cut(test, []byte("\n- name: "))
		assert.Equal(t, 2, bytes.Count(test, []byte("eval_time: ")), "%s: before and after", alert.Alert)
		assert.Equal(t, 1, bytes.Count(test, []byte("exp_samples:")), "%s fires once", alert.Alert)
	}
}
