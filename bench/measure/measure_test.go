package measure

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestQuantile(t *testing.T) {
	values := []int{5, 1, 4, 2, 3}
	assert.Equal(t, 1, Quantile(values, 0))
	assert.Equal(t, 3, Median(values))
	assert.Equal(t, 5, Quantile(values, 1))
	assert.Equal(t, []int{5, 1, 4, 2, 3}, values, "left as they were")
	assert.Zero(t, Median[float64](nil))
}

func TestSlope(t *testing.T) {
	assert.InDelta(t, 2, Slope([]float64{0, 1, 2, 3}, []float64{5, 7, 9, 11}), 1e-9)
	assert.InDelta(t, 0, Slope([]float64{0, 1, 2}, []float64{3, 3, 3}), 1e-9)
	assert.Zero(t, Slope([]float64{1, 1}, []float64{3, 4}))
}

func TestReport(t *testing.T) {
	r := NewReport("make it")
	r.Add("start", "to ready", 0.25, "s").AtMost(0.3)
	r.Add("start", "peak", 123.4, "MiB").AtMost(100).Notef("%d starts", 3)
	r.Add("load", "ratio", 0.9512, "").AtLeast(0.95)
	r.Add("load", "upstream calls", 2, "").Exactly(1)
	r.Add("load", "requests", 1234567, "")
	var b strings.Builder
	require.NoError(t, r.Markdown(&b))
	_, table, _ := strings.Cut(b.String(), "|---|---|---:|---:|---|---|\n")
	assert.Equal(t, `| **start** | to ready | 0.25 s | ≤ 0.3 | met |  |
|  | peak | 123 MiB | ≤ 100 | **missed** | 3 starts |
| **load** | ratio | 0.951 | ≥ 0.95 | met |  |
|  | upstream calls | 2 | 1 | **missed** |  |
|  | requests | 1234567 |  |  |  |
`, table)
}

func TestCPUTime(t *testing.T) {
	before, err := CPUTime(os.Getpid())
	require.NoError(t, err)
	for end := time.Now().Add(20 * time.Millisecond); time.Now().Before(end); {
	}
	after, err := CPUTime(os.Getpid())
	require.NoError(t, err)
	assert.Greater(t, after-before, 5*time.Millisecond)
	_, err = CPUTime(1 << 22)
	assert.Error(t, err)
}

func TestMemoryOf(t *testing.T) {
	m, err := MemoryOf(os.Getpid())
	require.NoError(t, err)
	assert.Positive(t, m.File)
	assert.Greater(t, m.Resident, m.File)
	assert.GreaterOrEqual(t, m.Peak, m.Resident)
}

func TestParseMetrics(t *testing.T) {
	m := parseMetrics("# HELP a b 1\n# TYPE a gauge\na 3\nb{mode=\"x y\"} 1.5e+06\nc NaN of sorts\n")
	assert.Equal(t, Metrics{"a": 3, `b{mode="x y"}`: 1.5e6}, m)
}
