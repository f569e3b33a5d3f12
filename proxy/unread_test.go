package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A connection on which a request's body never comes is in use, so that no other may take
// its place: it has to end by itself, whoever answers, and whether anybody wants the body.
func TestMissingBody(t *testing.T) {
	for name, raw := range map[string]string{
		"answered by a handler":   "POST " + tokenURL + " HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n",
		"in chunks":               "POST " + tokenURL + " HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
		"answered by http.Server": "POST " + tokenURL + " HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\nExpect: the worst\r\n\r\n",
		"to come after a 100":     "POST " + tokenURL + " HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pod, end := serveOne(t, Config{})
				defer end()
				began := time.Now()
				go func() { _, _ = io.WriteString(pod, raw) }()
				answer := make(chan string, 1)
				go func() {
					all, _ := io.ReadAll(pod)
					answer <- string(all)
				}()
				select {
				case all := <-answer:
					assert.Contains(t, all, "HTTP/1.1 4")
					assert.LessOrEqual(t, time.Since(began), readTimeout)
				case <-time.After(time.Hour):
					t.Error("it is open after an hour")
				}
			})
		})
	}
}

// Whoever sends or reads nothing, or next to nothing, is cut.
func TestTimeouts(t *testing.T) {
	const head, refused = "GET /metadata/versions HTTP/1.1\r\n", "GET " + tokenURL + " HTTP/1.1\r\nHost: h\r\n\r\n"
	for name, tc := range map[string]struct {
		raw    string
		drip   string // sent again each second
		reads  bool
		lasts  time.Duration
		status string // of the answer
	}{
		"nothing comes":                 {"", "", true, readHeaderTimeout, ""},
		"half a header":                 {head, "", true, readHeaderTimeout, ""},
		"a header bit by bit":           {head, "X: y\r\n", true, readHeaderTimeout, ""},
		"half a header after an answer": {refused + head, "", true, readHeaderTimeout, "400"},
		"nothing after an answer":       {refused, "", true, idleTimeout, "400"},
		"the answer is not read":        {refused, "", false, writeTimeout, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				pod, end := serveOne(t, Config{})
				began := time.Now()
				var sending sync.WaitGroup
				defer sending.Wait()
				defer end()
				sending.Go(func() {
					_, err := io.WriteString(pod, tc.raw)
					for err == nil && tc.drip != "" {
						time.Sleep(time.Second)
						_, err = io.WriteString(pod, tc.drip)
					}
				})
				if tc.reads {
					answer, _ := io.ReadAll(pod)
					assert.Contains(t, string(answer), tc.status)
				} else {
					sending.Wait()
				}
				for open := true; open && time.Since(began) < time.Hour; { // nobody takes it until it is closed
					_ = pod.SetWriteDeadline(time.Now().Add(time.Second))
					_, err := io.WriteString(pod, "x")
					open = !errors.Is(err, io.ErrClosedPipe)
				}
				took := time.Since(began)
				assert.GreaterOrEqual(t, took, tc.lasts)
				assert.LessOrEqual(t, took, tc.lasts+2*time.Second)
			})
		})
	}
}

// slowIMDS answers after a while, unless the request has ended by then.
type slowIMDS time.Duration

func (d slowIMDS) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case <-time.After(time.Duration(d)):
		return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("{}")), Request: r}, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// A token may take longer than readTimeout: a minute each for its pod and its identity, 2 s for
// the API server, and 25 s for its turn and the response, for each tenant.
func TestResponseAfterReadTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod, end := serveOne(t, Config{Upstream: slowIMDS(172 * time.Second)})
		defer end()
		go func() { _, _ = io.WriteString(pod, "GET /metadata/versions HTTP/1.1\r\nHost: h\r\n\r\n") }()
		resp, err := http.ReadResponse(bufio.NewReader(pod), nil)
		require.NoError(t, err)
		defer resp.Body.Close()
		assert.Equal(t, 200, resp.StatusCode)
	})
}

// serveOne serves one connection, of a bound pod, until end is called.
func serveOne(t *testing.T, cfg Config) (pod *pipe, end func()) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	cfg.Logger = slog.New(slog.DiscardHandler)
	s, ln, served := New(cfg), newPipes(), make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	pod = ln.dial(bound)
	return pod, func() {
		assert.NoError(t, pod.Close())
		stop()
		assert.NoError(t, <-served)
		assert.Zero(t, s.Stats().Connections.Open)
	}
}
