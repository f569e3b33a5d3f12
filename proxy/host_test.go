package proxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	ownHost = "127.0.0.1" // the node itself
	nobody  = 65534
)

func withHost(c *Config) { c.HostTokenUIDs = []uint32{uint32(os.Getuid())} }

// hostRequest is what the provider of the Secrets Store CSI driver sends.
func hostRequest(name, query string) string {
	return request("GET", "/host/token/?resource=https://vault.azure.net/"+query, "podns: shop", "podname: "+name)
}

func TestHostToken(t *testing.T) {
	w := newWorld(t, withHost)
	resp, body := w.send(ownHost, hostRequest("bound", ""))
	require.Equal(t, 200, resp.StatusCode, body)
	var answer struct {
		Token    map[string]string `json:"token"`
		ClientID string            `json:"clientid"`
	}
	require.NoError(t, json.Unmarshal([]byte(body), &answer))
	assert.Equal(t, one.ClientID, answer.ClientID)
	assert.Len(t, answer.Token, 7)
	for _, field := range []string{"access_token", "refresh_token", "expires_in", "expires_on", "not_before", "resource", "token_type"} {
		assert.Contains(t, answer.Token, field)
	}
	assert.Equal(t, "https://vault.azure.net/", answer.Token["resource"])
	assert.Equal(t, one.ClientID, tokenSubject(fmt.Sprintf(`{"access_token":%q}`, answer.Token["access_token"])))

	resp, body = w.send(ownHost, hostRequest("bound", "&client_id="+two.ClientID))
	assert.Equal(t, 400, resp.StatusCode)
	assert.Equal(t, noID, body)
	resp, _ = w.send(ownHost, hostRequest("bound", "&mi_res_id="+two.ResourceID))
	assert.Equal(t, 200, resp.StatusCode)
	resp, body = w.send(ownHost, hostRequest("unbound", ""))
	assert.Equal(t, 400, resp.StatusCode)
	assert.Equal(t, noID, body)
	resp, _ = w.send(ownHost, strings.Replace(hostRequest("bound", ""), "/?", "?", 1))
	assert.Equal(t, 200, resp.StatusCode, "without the slash too")
	resp, _ = w.send(ownHost, hostRequest("not-there", ""))
	assert.Equal(t, 503, resp.StatusCode, "it may be about to appear")
	resp, body = w.send(ownHost, request("GET", "/host/token?resource=r", "podns: shop"))
	assert.Equal(t, 400, resp.StatusCode)
	assert.Contains(t, body, "podname")
	resp, _ = w.send(ownHost, strings.Replace(hostRequest("bound", ""), "GET", "POST", 1))
	assert.Equal(t, 405, resp.StatusCode)
}

func TestLoopbackIsServedHostTokensOnly(t *testing.T) {
	w := newWorld(t, withHost)
	for _, target := range []string{tokenURL, "/metadata/instance?api-version=2021-02-01", "/metadata/versions", "/host/token//", "/host/token/x", "/host/tokens", "/Host/token", "//host/token"} {
		resp, _ := w.send(ownHost, request("GET", target, "Metadata: true", "podns: shop", "podname: bound"))
		assert.Equal(t, 404, resp.StatusCode, target)
	}
	assert.Zero(t, w.imds.Requests())
}

func TestHostTokenForPods(t *testing.T) {
	w := newWorld(t, withHost)
	resp, _ := w.send(bound, hostRequest("bound", ""))
	assert.Equal(t, 404, resp.StatusCode)
	assert.Zero(t, w.imds.Requests())
}

func TestHostTokenDisabled(t *testing.T) {
	w := newWorld(t, nil)
	resp, _ := w.send(ownHost, hostRequest("bound", ""))
	assert.Equal(t, 404, resp.StatusCode)
}

// TestHostTokenHelper is the process that TestHostTokenUIDs starts.
func TestHostTokenHelper(t *testing.T) {
	addr := os.Getenv("NMI_TEST_ADDR")
	if addr == "" {
		return // it is started by another test
	}
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.WriteString(conn, hostRequest("bound", "")+"\r\n\r\n")
	require.NoError(t, err)
	answer, err := io.ReadAll(conn)
	require.NoError(t, err)
	fmt.Printf("%s\n", answer)
}

func TestHostTokenUIDs(t *testing.T) {
	require.Zero(t, os.Getuid(), "to become another user: run this as root")
	w := newWorld(t, func(c *Config) { c.HostTokenUIDs = []uint32{0} })
	exe, err := os.Executable()
	require.NoError(t, err)
	// Where another user can run it.
	dir, err := os.MkdirTemp("", "nmi")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755)) // for another user to run it
	program := dir + "/test"
	content, err := os.ReadFile(exe)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(program, content, 0o755)) // likewise
	for uid, want := range map[uint32]string{0: "HTTP/1.1 200 ", nobody: "HTTP/1.1 403 "} {
		cmd := exec.CommandContext(t.Context(), program, "-test.run=^TestHostTokenHelper$", "-test.v")
		cmd.Dir = "/"
		cmd.Env = []string{"NMI_TEST_ADDR=" + w.addr}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		assert.Contains(t, string(out), want)
	}
	assert.Contains(t, w.log.String(), "uid=65534")
	assert.Equal(t, 1, w.imds.Requests())
}

// Whoever the kernel does not know may be anybody.
func TestHostTokenUnknownSocketOwner(t *testing.T) {
	w := newWorld(t, withHost)
	err := w.server.checkUser(new(http.Request), nil)
	require.ErrorIs(t, err, errHostUser)
}

// What a process may not do it may try in a loop, and must not fill the log by it.
func TestHostTokenRefusalsAreRateLimitedInLog(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.HostTokenUIDs = []uint32{uint32(os.Getuid()) + 1} })
	for range 200 {
		resp, _ := w.send(ownHost, hostRequest("bound", ""))
		require.Equal(t, 403, resp.StatusCode)
	}
	lines := strings.Count(w.log.String(), "level=WARN")
	assert.Positive(t, lines)
	assert.Less(t, lines, 100)
}

// A proxy of root's on the host network, such as an ingress controller, that somebody
// has told to forward to 127.0.0.1.
func TestHostTokenWithXForwardedFor(t *testing.T) {
	w := newWorld(t, withHost)
	resp, body := w.send(ownHost, strings.Replace(hostRequest("bound", ""), "podns:", "X-Forwarded-For: 1.2.3.4\r\npodns:", 1))
	assert.Equal(t, 400, resp.StatusCode)
	assert.Contains(t, body, "X-Forwarded-For")
	assert.Zero(t, w.imds.Requests())
}

// What the node asks for on behalf of a pod counts towards that pod's bounds, and no
// other's.
func TestHostTokenCountsTowardsThePodsRate(t *testing.T) {
	w := newWorld(t, withHost)
	statuses := map[int]int{}
	ask := func(from, raw string) int {
		resp, _ := w.send(from, raw)
		return resp.StatusCode
	}
	named := func(name string, i int) string {
		return strings.Replace(hostRequest(name, ""), "vault", fmt.Sprint("made-up-", i), 1)
	}
	for i := range 60 {
		statuses[ask(ownHost, named("bound", i))]++
	}
	assert.GreaterOrEqual(t, statuses[200], 20, "its burst")
	assert.Positive(t, statuses[429], "%v", statuses)
	assert.Equal(t, 60, statuses[200]+statuses[429], "%v", statuses)
	assert.Equal(t, 429, ask(bound, request("GET", tokenURL+"made-up", "Metadata: true")), "the pod itself")
	assert.Equal(t, 200, ask(alsoBound, request("GET", tokenURL+"made-up", "Metadata: true")), "another pod")
	assert.Equal(t, 200, ask(ownHost, named("also-bound", 61)), "on behalf of it")
}
