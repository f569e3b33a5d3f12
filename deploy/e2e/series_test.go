//go:build e2e

package e2e

import (
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// seriesFile has the series that the queries of deploy/monitoring may use. Its tests check them
// without an agent; this one checks the file. -write writes it.
const seriesFile = "../monitoring/testdata/series.txt"

// differs is what other machines and versions have other values of.
var differs = regexp.MustCompile(`\b(version|goversion|backend|mode|quantile)="[^"]*"`)

// TestSeries: an agent that has served and refused has every series that dashboard and alerts ask for.
func TestSeries(t *testing.T) {
	s := begin(t)
	a := s.agent()
	served, refused := s.pod("served-0", "10.244.0.96", testbed.Ptp, "cart"), s.pod("refused-0", "10.244.0.97", testbed.Ptp, "nothing")
	for range 3 {
		served.hears(vault, cart.ClientID)
	}
	require.Equal(t, http.StatusBadRequest, refused.asks(vault).status)
	scrape := func() string {
		client := &http.Client{Timeout: patience}
		defer client.CloseIdleConnections()
		status, text := page(client, "127.0.0.1", metricsPort, "/metrics")
		require.Equal(t, http.StatusOK, status)
		return text
	}
	text := scrape()
	s.stops(a)
	s.kubepods().agent() // has another fence
	for line := range strings.Lines(scrape()) {
		if strings.HasPrefix(line, "nmi_rules_in_place{") {
			text += line
		}
	}
	got := seriesIn(text)
	if *write {
		require.NoError(t, os.WriteFile(seriesFile, []byte(strings.Join(got, "\n")+"\n"), 0o644))
	}
	stored, err := os.ReadFile(seriesFile)
	require.NoError(t, err)
	for line := range strings.Lines(string(stored)) {
		assert.True(t, slices.Contains(got, strings.TrimSpace(line)), "the agent has no series %s", line)
	}
}

// seriesIn lists the series of a page, of a histogram's buckets the infinite one alone.
func seriesIn(page string) (all []string) {
	for line := range strings.Lines(page) {
		end := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || end < 0 || strings.Contains(line, `le="`) && !strings.Contains(line, `le="+Inf"`) {
			continue
		}
		all = append(all, differs.ReplaceAllString(line[:end], `$1="*"`))
	}
	slices.Sort(all)
	return slices.Compact(all)
}
