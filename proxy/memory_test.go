package proxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
)

// maxPerConnection is what docs/security.md, Memory, says of a connection's share of the
// agent's own memory.
const maxPerConnection = 56 << 10

// maxHeadLines is proxy/listener's bound of the lines of a head.
const maxHeadLines = 64

// fullHead is a head of as many bytes and lines as one may have, every line another field.
func fullHead(target string) string {
	var b strings.Builder
	b.WriteString("GET " + target + " HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n")
	for i := range maxHeadLines - 5 {
		fmt.Fprintf(&b, "X%d: %s\r\n", i, strings.Repeat("x", 100))
	}
	b.WriteString("X: " + strings.Repeat("x", 8<<10-b.Len()-len("X: \r\n\r\n")) + "\r\n\r\n")
	return b.String()
}

// usedMemory is what the process has in use for objects and stacks.
func usedMemory() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// Whatever its client does, a connection holds no more than the documents say.
func TestMemoryPerConnection(t *testing.T) {
	tiny := "GET /x HTTP/1.1\r\nHost: h\r\n" + manyFields(1300) + "\r\n"
	for name, tc := range map[string]struct {
		sends string
		state string
	}{
		"silent":                         {"", "open"},
		"half a head":                    {fullHead("/x")[:8<<10-10], "open"},
		"waits for its pod":              {fullHead(tokenURL), "busy"},
		"waits for IMDS, and sends more": {fullHead(versions) + fullHead(tokenURL), "busy"},
		"sends heads of 1,300 fields, reads none": {strings.Repeat(tiny, 20), "ended"},
	} {
		t.Run(name, func(t *testing.T) {
			const n = 200
			imds := newHeldIMDS()
			w := newWorld(t, func(c *Config) {
				c.Upstream, c.MaxConnectionsPerPod = imds, n
				c.Pods = newResolver(t, podresolver.Config{PodWait: time.Minute, Logger: c.Logger}) // and never hears of a pod
			})
			defer close(imds.release)
			before := usedMemory()
			for range n {
				c := w.connect(stranger)
				require.NoError(t, c.Conn.(*net.TCPConn).SetReadBuffer(0))
				go func() { _, _ = io.WriteString(c, tc.sends) }()
			}
			switch tc.state {
			case "open":
				w.waitForOpen(n)
			case "busy": // http.Server has its head, and is not done with it
				w.waitForBusy(n)
			default:
				w.waitForOpen(0)
			}
			each := (usedMemory() - before) / n
			t.Logf("%d bytes each", each)
			assert.Less(t, each, int64(maxPerConnection))
		})
	}
}

// waitForBusy waits until so many connections are in use.
func (w *world) waitForBusy(n int) {
	w.t.Helper()
	w.eventually(func() bool { return w.server.Stats().Connections.Busy == n }, "%d connections in use", n)
}

// manyFields are n different ones of six bytes each.
func manyFields(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%c%c%c:\r\n", 'a'+i%26, 'a'+i/26%26, 'a'+i/676)
	}
	return b.String()
}

// A body is not counted, whatever comes in one Read with the head before it.
func TestBodyLinesAreNotCounted(t *testing.T) {
	p := newPlainIMDS(t)
	pod := p.pod()
	body := strings.Repeat("x\n", 500)
	pod.write(t, fmt.Sprintf("POST /metadata/x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	imds := p.accept()
	r, err := http.ReadRequest(imds.r)
	require.NoError(t, err)
	got, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	assert.Equal(t, body, string(got))
}

// Requests that come at once are counted each on its own.
func TestPipelinedRequests(t *testing.T) {
	w := newWorld(t, nil)
	c := w.connect(bound)
	const n = 100
	_, err := io.WriteString(c, strings.Repeat(get(tokenURL), n))
	require.NoError(t, err)
	for range n {
		resp, err := http.ReadResponse(c.r, nil)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, 200, resp.StatusCode)
	}
}

// A body that nobody wants, trailer included, is not waited for.
func TestResponseBeforeTrailers(t *testing.T) {
	w := newWorld(t, nil)
	resp, _ := w.send(bound, request("GET", tokenURL, "Metadata: true", "Transfer-Encoding: chunked")+"0\r\n"+manyFields(1300)+"\r\n")
	assert.Equal(t, 200, resp.StatusCode)
}
