package main

import (
	"bytes"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/clusters/asker/answers"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// TestMain is the program itself where a test starts it.
func TestMain(m *testing.M) {
	if os.Getenv("ASKER_TEST") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// runs starts the program, and returns its log and whether it ended with 0.
func runs(t *testing.T, args ...string) (all []answers.Answer, sum answers.Summary, ok bool) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "ASKER_TEST=1")
	var out bytes.Buffer
	cmd.Stdout = &out
	ok = cmd.Run() == nil
	all, sum, err := answers.Read(&out)
	require.NoError(t, err)
	return all, sum, ok
}

func TestAsker(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{{ClientID: "cart"}, {ClientID: "report"}}})
	srv := imds.Start()
	defer srv.Close()
	url := func(clientID string) string {
		return srv.URL + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r&client_id=" + clientID
	}

	all, _, ok := runs(t, "-n=4", "-every=1ms", "-want=cart", url("cart"), url("report"))
	assert.False(t, ok, "the other's is not what it wants")
	require.Len(t, all, 4)
	assert.Equal(t, []string{"cart", "report", "cart", "report"}, []string{all[0].Subject, all[1].Subject, all[2].Subject, all[3].Subject})
	assert.Equal(t, []int{0, 1, 0, 1}, []int{all[0].Ask, all[1].Ask, all[2].Ask, all[3].Ask})
	assert.Equal(t, 1, all[0].Tries)

	all, _, ok = runs(t, "-want=cart", url("nobody"))
	assert.False(t, ok)
	require.Len(t, all, 1)
	assert.Equal(t, http.StatusBadRequest, all[0].Status)
	assert.Contains(t, all[0].Error, "Identity not found")

	imds.Inject(imdstest.Fault{Status: http.StatusTooManyRequests, RetryAfter: "0"}, imdstest.Fault{Status: http.StatusServiceUnavailable, RetryAfter: "0"})
	all, _, ok = runs(t, "-retry", "-want=cart", url("cart"))
	assert.True(t, ok)
	require.Len(t, all, 1)
	assert.Equal(t, 3, all[0].Tries)
	assert.Len(t, all[0].Failures, 2)

	imds.Inject(imdstest.Fault{}, imdstest.Fault{Cut: true})
	all, sum, ok := runs(t, "-n=5", "-every=1ms", "-summary=1h", "-want=cart", url("cart"))
	assert.False(t, ok)
	assert.Equal(t, 4, sum.Right)
	require.Len(t, all, 1, "only what went wrong")
	assert.Zero(t, all[0].Status)
	assert.Contains(t, all[0].Error, "EOF")
}

func TestHostToken(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	var connections atomic.Int32
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.Equal(t, "mounting", r.Header.Get("Podname"))
		token := httptest.NewRecorder()
		r.URL.Path, r.RequestURI = "/metadata/identity/oauth2/token", "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r"
		imds.ServeHTTP(token, r)
		_, _ = w.Write([]byte(`{"clientid":"x","token":` + strings.TrimSpace(token.Body.String()) + `}`))
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	args := []string{"-n=3", "-every=1ms", "-header=podname: mounting", srv.URL + "/host/token/?api-version=2018-02-01&resource=r"}
	all, _, _ := runs(t, args...)
	require.Len(t, all, 3)
	assert.Equal(t, imdstest.Node, all[2].Subject)
	assert.EqualValues(t, 1, connections.Load(), "kept")
	runs(t, append([]string{"-fresh"}, args...)...)
	assert.EqualValues(t, 4, connections.Load())
}
