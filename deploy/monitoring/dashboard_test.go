package monitoring

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// panel is what the tests read of one.
type panel struct {
	ID          int
	Type, Title string
	GridPos     struct{ H, W, X, Y int }
	Targets     []struct{ Expr, LegendFormat string }
}

type dashboard struct {
	Panels     []panel
	Templating struct {
		List []struct{ Name, Type, Definition string }
	}
}

var (
	legendLabel = regexp.MustCompile(`{{(\w+)}}`)
	labelValues = regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)
	// variables are Grafana's, with values to parse by.
	variables = strings.NewReplacer("$node", ".*", "$__rate_interval", "5m")
)

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile("dashboard.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &d))
	return d
}

// TestDashboardQueries: each can be parsed, asks for what an agent has, and follows the variable of nodes.
func TestDashboardQueries(t *testing.T) {
	known, d := served(t), readDashboard(t)
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			has, err := known.check(variables.Replace(target.Expr))
			assert.NoError(t, err, p.Title)
			for _, label := range legendLabel.FindAllStringSubmatch(target.LegendFormat, -1) {
				assert.Contains(t, has, label[1], "%s: %s", p.Title, target.LegendFormat)
			}
			assert.Equal(t, strings.Count(target.Expr, `job="nmi"`), strings.Count(target.Expr, `job="nmi", node=~"$node"`), "%s: %s", p.Title, target.Expr)
		}
	}
	var names []string
	for _, variable := range d.Templating.List {
		names = append(names, variable.Name+" "+variable.Type)
		if variable.Type == "query" {
			call := labelValues.FindStringSubmatch(variable.Definition)
			require.NotNil(t, call, variable.Definition)
			has, err := known.check(call[1])
			assert.NoError(t, err)
			assert.Contains(t, has, call[2])
		}
	}
	assert.Equal(t, []string{"datasource datasource", "node query"}, names)
}

// TestPanels: panels of Grafana's core alone, which do not overlap.
func TestPanels(t *testing.T) {
	ids, taken := make(map[int]bool), make(map[[2]int]string)
	var rows []string
	for _, p := range readDashboard(t).Panels {
		assert.Contains(t, []string{"row", "stat", "timeseries", "table", "text"}, p.Type, p.Title)
		assert.False(t, ids[p.ID], p.Title)
		ids[p.ID] = true
		if p.Type == "row" {
			rows = append(rows, p.Title)
		} else if p.Type != "text" {
			assert.NotEmpty(t, p.Targets, p.Title)
		}
		assert.LessOrEqual(t, p.GridPos.X+p.GridPos.W, 24, p.Title)
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				other := taken[[2]int{x, y}]
				require.Empty(t, other, "%s overlaps it", p.Title)
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
	assert.Equal(t, []string{"Is it serving?", "Who is refused, and why?", "IMDS and limits", "Rules and fences", "Tokens in memory", "The agent's CPU and memory"}, rows)
}
