package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/bench/sdk"
)

func TestParseFastPath(t *testing.T) {
	got, err := parseFastPath(`# HELP nmi_fast_path_requests_total Requests.
# TYPE nmi_fast_path_requests_total counter
nmi_fast_path_requests_total{from="keep-alive"} 12
nmi_fast_path_requests_total{from="new"} 3
nmi_fast_path_connections 7
nmi_cache_hits_total 15
`)
	require.NoError(t, err)
	before := map[string]float64{`nmi_fast_path_requests_total{from="keep-alive"}`: 10, `nmi_fast_path_requests_total{from="new"}`: 3}
	assert.Equal(t, map[string]float64{`nmi_fast_path_requests_total{from="keep-alive"}`: 12, `nmi_fast_path_requests_total{from="new"}`: 3}, got)
	assert.Equal(t, map[string]float64{`nmi_fast_path_requests_total{from="keep-alive"}`: 2}, growth(before, got))
	_, err = parseFastPath("nmi_fast_path_total x\n")
	require.Error(t, err)
}

func TestCommand(t *testing.T) {
	t.Setenv("BENCH_PEER", "")
	assert.Equal(t, "sudo make bench", command([]string{"-out", "bench/results"}))
	assert.Equal(t, `sudo make bench BENCHFLAGS="-rounds 1"`, command([]string{"-rounds", "1", "-out", "x"}))
	assert.Equal(t, `sudo make bench BENCHFLAGS="-only 'half|keep'"`, command([]string{"-only", "half|keep"}))
	t.Setenv("BENCH_PEER", "/usr/bin/other")
	assert.Equal(t, "sudo BENCH_PEER=<its binary> make bench", command(nil))
}

func TestCPUModel(t *testing.T) {
	assert.Equal(t, "AMD EPYC", cpuModel("processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: other\n"))
	assert.Equal(t, "unknown CPU", cpuModel("processor\t: 0\n"))
}

func TestParseProgramTime(t *testing.T) {
	got, err := parseProgramTime("cpu  100 20 3 9999 88 77 66 55 0 0\ncpu0 50 10 1 4999 44 33 33 22 0 0\n")
	require.NoError(t, err)
	assert.Equal(t, 1230*time.Millisecond, got)
	for _, text := range []string{"", "cpu 1 2", "cpu0 1 2 3", "cpu 1 x 3 4"} {
		_, err := parseProgramTime(text)
		assert.Error(t, err, text)
	}
}

func TestWrkVersion(t *testing.T) {
	assert.Equal(t, "debian/4.1.0-3+b2", wrkVersion("wrk debian/4.1.0-3+b2 [epoll] Copyright (C) 2012 Will Glozer\n"))
	assert.Equal(t, "unknown", wrkVersion(""))
}

func TestLoads(t *testing.T) {
	names := make(map[string]bool)
	for _, l := range loads {
		assert.False(t, names[l.name], l.name)
		names[l.name] = true
		assert.LessOrEqual(t, l.pods, pods)
		assert.LessOrEqual(t, l.connections, 64, "the agent keeps no more of a pod")
		if l.head != "" {
			_, err := sdk.Find(l.head)
			require.NoError(t, err)
		}
	}
	for name := range shortLoads {
		assert.True(t, names[name], name)
	}
	for _, g := range goals("agent", "nginx", "net/http") {
		assert.True(t, names[g.Load] || g.Load == halfRate, g.Load)
	}
}
