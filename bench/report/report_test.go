package report

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// example has two servers and three rounds: a is twice as fast as b, on a machine whose
// speed halves from round to round.
func example() *Report {
	r := &Report{
		Date: "2026-11-26", Command: "sudo make bench", Commit: "abc", Rounds: 3, Seconds: 5, TokenBytes: 1827,
		Machine: Machine{CPU: "CPU", Cores: 2, Kernel: "6.18", Go: "go1.26", Nginx: "1.22", Wrk: "4.1"},
		Servers: []string{"a", "b"},
		Goals: []Goal{
			{Load: "closed", Server: "a", Than: "b", Least: 1.9},
			{Load: "closed", Server: "a", Than: "b", Least: 2.1},
			{Load: "half", Server: "a", Than: "b", Most: 0.6},
			{Load: "half", Server: "a", Than: "b", Most: 0.4},
			{Load: "not measured", Server: "a", Than: "b", Least: 1},
		},
		Clients: []Client{{Name: "sdk", Requests: 5, FastPath: map[string]float64{"fast_path_total": 4}}, {Name: "other", Requests: 5}},
	}
	for i, speed := range []float64{40_000, 20_000, 10_000} {
		r.Samples = append(r.Samples,
			Sample{Load: "closed", Server: "a", Round: i + 1, PerSecond: 2 * speed, CPU: 10, P50: 500, P99: 2000, P999: 12_000},
			Sample{Load: "closed", Server: "b", Round: i + 1, PerSecond: speed, CPU: 20, Other: 4, P50: 900, P99: 4000, P999: 2_000_000},
			Sample{Load: "fixed", Server: "a", Round: i + 1, Rate: 500, PerSecond: 500, P50: 100, P99: 1e7 / speed, P999: 900, Max: 1000, LagP99: 2},
			Sample{Load: "fixed", Server: "b", Round: i + 1, Rate: 500, PerSecond: 500, P50: 100, P99: 2e7 / speed, P999: 900, Max: 1000, LagP99: 2},
			Sample{Load: "half", Server: "a", Round: i + 1, Rate: 1000, PerSecond: 1000, P50: 100, P99: 1e7 / speed, P999: 900, Max: 1000, LagP99: 2},
			Sample{Load: "half", Server: "b", Round: i + 1, Rate: 2000, PerSecond: 2000, P50: 100, P99: 2e7 / speed, P999: 900, Max: 1000, LagP99: 2})
	}
	return r
}

func TestRatiosAreOfTheSameRound(t *testing.T) {
	r := example()
	assert.Equal(t, spread{2, 2, 2}, r.ratio("closed", "a", "b", perSecond))
	assert.Equal(t, spread{40_000, 20_000, 80_000}, r.over("closed", "a", perSecond))
	assert.InDelta(t, 20_000, r.Median("closed", "b"), 0)
	assert.True(t, math.IsNaN(r.Median("closed", "c")))
}

func TestSpread(t *testing.T) {
	assert.Equal(t, spread{2, 1, 3}, spreadOf([]float64{3, 1, 2}))
	assert.Equal(t, spread{2.5, 1, 4}, spreadOf([]float64{4, 3, 1, 2}))
}

func TestMarkdown(t *testing.T) {
	text := example().Markdown()
	for _, line := range []string{
		"Command: `sudo make bench`, at abc. Machine: CPU, 2 cores, Linux 6.18, go1.26, nginx 1.22, wrk 4.1.",
		"Meanwhile other programs used 0 % of a core (median of all measurements; 4 % at the highest).",
		"| closed: requests/s of a to b | 2.00 | ≥ 1.90 | met |", "| closed: requests/s of a to b | 2.00 | ≥ 2.10 | MISSED |",
		"| half: p99 of a to b | 0.50 | ≤ 0.60 | met |", "| half: p99 of a to b | 0.50 | ≤ 0.40 | MISSED |",
		"| load | server | requests/s | to b | CPU, µs | core, % | p50 | p99 | p99.9 |", "|---|---|---:|---:|---:|---:|---:|---:|---:|",
		"| closed | a | 40000 (20000 to 80000) | 2.00 | 10.0 | 40 | 500 µs | 2.00 ms | 12 ms |",
		"| closed | b | 20000 (10000 to 40000) | 1.00 | 20.0 | 40 | 900 µs | 4.00 ms | 2.0 s |",
		"| half | a | 1000 | 0.0 | 100 µs | 500 µs | 900 µs | 1.00 ms | 2 µs |  |",
		"| sdk | 5 | `fast_path_total` 4 |", "| other | 5 | - |",
	} {
		assert.Contains(t, text, line+"\n")
	}
	assert.NotContains(t, text, "not measured")
	assert.NotContains(t, text, "NaN")
	assert.NotContains(t, text, "<picture>")
}

func TestTablesAreWellFormed(t *testing.T) {
	columns := 0
	for line := range strings.Lines(example().Markdown()) {
		switch n := strings.Count(line, "|"); {
		case n == 0:
			columns = 0
		case columns == 0:
			columns = n
		default:
			assert.Equal(t, columns, n, line)
		}
	}
}

func TestNotMeasured(t *testing.T) {
	r := example()
	r.NotMeasured = []string{"x, c", "closed, c", "x, c"}
	assert.Contains(t, r.Markdown(), "\nFailed, and so not in every round: closed, c; x, c.\n")
}

func TestRemarks(t *testing.T) {
	r := example()
	r.Samples[4].Saturated = true
	r.Samples[10].Invalid = true
	assert.Contains(t, r.Markdown(), "| saturated in 1 of 3; INVALID in 1 of 3: the generator was late |")
}

func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "results")
	r := example()
	require.NoError(t, r.Write(dir, []string{"a", "b"}))
	text, err := os.ReadFile(filepath.Join(dir, "2026-11-26-cached.json"))
	require.NoError(t, err)
	var back Report
	require.NoError(t, json.Unmarshal(text, &back))
	assert.Equal(t, r.Samples, back.Samples)

	markdown, err := os.ReadFile(filepath.Join(dir, "2026-11-26-cached.md"))
	require.NoError(t, err)
	plots, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	require.NoError(t, err)
	assert.Len(t, plots, 4)
	for _, plot := range plots {
		assert.Contains(t, string(markdown), `"`+filepath.Base(plot)+`"`)
		text, err := os.ReadFile(plot)
		require.NoError(t, err)
		assertXML(t, string(text))
		assert.NotContains(t, string(text), "NaN")
		assert.NotContains(t, string(text), "Inf")
	}
}

func assertXML(t *testing.T, text string) {
	t.Helper()
	decoder := xml.NewDecoder(strings.NewReader(text))
	for {
		_, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err, text)
	}
}

func TestPlotsOfNothing(t *testing.T) {
	r := &Report{}
	assert.Empty(t, r.throughput([]string{"a"}, light))
	assert.Empty(t, r.latency([]string{"a"}, light))
}

// A point is plotted unless half of its rounds are doubtful.
func TestDoubtfulLatencies(t *testing.T) {
	r := example()
	points := func() int { return strings.Count(r.latency([]string{"a", "b"}, light), "<circle") }
	assert.Equal(t, 2, points())
	r.Samples[2].Invalid = true
	assert.Equal(t, 2, points())
	r.Samples[8].Saturated = true
	assert.Equal(t, 1, points())
}

// TestOwnRates are not on the lines: from one server to the next they are of other rates.
func TestOwnRates(t *testing.T) {
	plot := example().latency([]string{"a", "b"}, light)
	assert.Equal(t, 5, strings.Count(plot, `class="diamond"`), "p50 and p99 of two servers, and the legend")
	assert.Contains(t, plot, ">at half</text>")
	r := example()
	r.Samples = slices.DeleteFunc(r.Samples, func(s Sample) bool { return s.Load == "half" })
	assert.Zero(t, strings.Count(r.latency([]string{"a", "b"}, light), `class="diamond"`))
}

var update = flag.Bool("update", false, "draw the plots of bench/results again")

// TestRecordedPlots are what their JSON gives, whatever drew them at the time.
func TestRecordedPlots(t *testing.T) {
	recorded, err := filepath.Glob("../results/*-cached.json")
	require.NoError(t, err)
	require.NotEmpty(t, recorded)
	for _, path := range recorded {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var r Report
		require.NoError(t, json.Unmarshal(text, &r))
		plotted := slices.Delete(slices.Clone(r.Servers), 1, 2) // without the agent's second mode
		for _, plot := range r.drawings() {
			for name, t1 := range map[string]theme{"light": light, "dark": dark} {
				file := strings.TrimSuffix(path, ".json") + "-" + plot.name + "-" + name + ".svg"
				drawn := plot.draw(plotted, t1)
				if *update {
					require.NoError(t, os.WriteFile(file, []byte(drawn), 0o644)) //nolint:gosec // for everybody
				}
				stored, err := os.ReadFile(file)
				require.NoError(t, err)
				same := drawn == string(stored) // without thousands of characters in the failure
				assert.True(t, same, "%s is not of its JSON: go test ./bench/report -update", file)
			}
		}
	}
}

func TestTick(t *testing.T) {
	for highest, want := range map[float64]float64{70_000: 20_000, 50_000: 10_000, 100_000: 20_000, 900: 200, 7: 2} {
		assert.InDelta(t, want, tick(highest, 6), 1e-9, "%v", highest)
	}
}

func TestLadder(t *testing.T) {
	assert.Equal(t, []float64{50, 100, 200, 500, 1000}, ladder(60, 900))
	assert.Equal(t, []float64{100, 200}, ladder(100, 100))
	assert.Equal(t, []float64{1, 2}, ladder(1, 2))
}

func TestThousands(t *testing.T) {
	assert.Equal(t, "0", thousands(0))
	assert.Equal(t, "999", thousands(999))
	assert.Equal(t, "1,000", thousands(1000))
	assert.Equal(t, "1,234,567", thousands(1234567))
}
