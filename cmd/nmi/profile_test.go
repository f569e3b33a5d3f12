package main

import (
	"io"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestProfiles(t *testing.T) {
	p := newProfilePage("127.0.0.1:0", slog.New(slog.DiscardHandler))
	serving := &component{run: p.run}
	serving.Start(t.Context())
	defer p.close()
	require.Eventually(t, func() bool { return p.tcpListener() != nil }, 30*time.Second, time.Millisecond)
	url := "http://" + p.tcpListener().Addr().String()
	for path, want := range map[string]string{
		"/debug/pprof/":                  "full goroutine stack dump",
		"/debug/pprof/goroutine?debug=1": "goroutine profile:",
		"/debug/pprof/profile?seconds=1": "",
		"/debug/pprof/cmdline":           "nmi",
	} {
		resp, err := http.Get(url + path)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		resp.Body.Close()
		assert.Equal(t, http.StatusOK, resp.StatusCode, path)
		assert.Contains(t, string(body), want, path)
		assert.False(t, resp.Close, "as it would be with the limits of a page that pods reach")
	}
	resp, err := http.Get(url + "/metrics")
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, http.StatusNotFound, resp.StatusCode)
	serving.Stop()
}

func TestProfilesAreOff(t *testing.T) {
	assert.False(t, mustParse(t, "--node=n").profile)
	assert.True(t, mustParse(t, "--node=n", "--enableProfile").profile)
}
