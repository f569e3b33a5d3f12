package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/status"
)

func TestStatusCommand(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "probe.sock")
	run := func(args ...string) (string, error) {
		cmd := command()
		var out strings.Builder
		cmd.SetOut(&out)
		cmd.SetArgs(append([]string{"status", "--probe-socket=" + socket}, args...))
		err := cmd.ExecuteContext(t.Context())
		return out.String(), err
	}
	_, err := run()
	require.ErrorContains(t, err, "no agent listens on")
	require.ErrorContains(t, err, "kubectl -n kube-system exec <agent's pod> -- nmi status")

	ln, err := listenUnix(t.Context(), socket)
	require.NoError(t, err)
	p := newPage(flagProbeSocket, slog.New(slog.DiscardHandler), nil)
	p.ln = ln
	snapshot := status.Snapshot{Agent: status.Agent{Node: "node1", Version: "v1", Ready: true}, Pods: []status.Pod{{Namespace: "shop", Name: strings.Repeat("n", 200<<10), State: status.OK}}}
	meanwhile := func() {} // while a client is served
	p.handler = status.Handler(func() status.Snapshot { meanwhile(); return snapshot }, http.NotFoundHandler())
	running := &component{run: p.run}
	running.Start(t.Context())
	t.Cleanup(func() { running.Stop(); p.close() })

	out, err := run()
	require.NoError(t, err)
	assert.Contains(t, out, "nmi v1 on node node1 is ready")
	assert.Contains(t, out, snapshot.Pods[0].Name, "more than 64 KiB")
	assert.NotContains(t, out, "\x1b", "not a terminal")
	out, err = run("-o", "json")
	require.NoError(t, err)
	var got status.Snapshot
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	assert.Equal(t, snapshot.Pods, got.Pods)
	meanwhile = func() { _, err = run() } // which does not get so far
	_, firstErr := run()
	require.NoError(t, firstErr)
	require.EqualError(t, err, "another client is reading the status; try again in some seconds")
	meanwhile = func() {}
	_, err = run("-o", "yaml")
	require.ErrorContains(t, err, "want table or json")
	_, err = run("else")
	require.ErrorContains(t, err, `unexpected argument "else"`)
	_, err = run("shop/cart")
	require.ErrorContains(t, err, `unexpected argument "shop/cart": nmi explain shop/cart says`)
}

// One client that does not read holds up the status for others, and no other page.
func TestOneStatusPageAtATime(t *testing.T) {
	large := strings.Repeat("x", 4<<20)
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+status.Page, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, large) })
	mux.HandleFunc("GET /page", hello)
	port := startPages(t, mux.ServeHTTP)
	const request = "GET /statusz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
	slow := dialFrom(t, "127.0.0.1", port)
	_, err := io.WriteString(slow, request)
	require.NoError(t, err)
	_, err = io.ReadFull(slow, make([]byte, 1))
	require.NoError(t, err)
	answer, err := exchange(dialFrom(t, "127.0.0.1", port), request)
	require.NoError(t, err)
	assert.Contains(t, answer, "503 Service Unavailable")
	answer, err = exchange(dialFrom(t, "127.0.0.1", port), get)
	require.NoError(t, err)
	assert.Contains(t, answer, "hello")
	_, err = io.Copy(io.Discard, slow)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		answer, err := exchange(dialFrom(t, "127.0.0.1", port), request)
		return err == nil && strings.Contains(answer, "200 OK")
	}, 30*time.Second, 10*time.Millisecond)
}
