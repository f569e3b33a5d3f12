package openloop

import (
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestScheduleKeepsTheRate(t *testing.T) {
	s := newSchedule(3, 2*time.Second) // 333.3 ms apart
	var dues []time.Duration
	for elapsed := time.Duration(0); elapsed < 3*time.Second; elapsed += time.Millisecond {
		for due, ok := s.take(elapsed); ok; due, ok = s.take(elapsed) {
			assert.LessOrEqual(t, due, elapsed)
			assert.Greater(t, due, elapsed-time.Millisecond-1)
			dues = append(dues, due.Round(time.Millisecond))
		}
	}
	const ms = time.Millisecond
	assert.Equal(t, []time.Duration{0, 333 * ms, 667 * ms, 1000 * ms, 1333 * ms, 1667 * ms}, dues, "without drift")
}

func TestScheduleDoesNotDrift(t *testing.T) {
	s := newSchedule(30_000, time.Hour) // a third of a nanosecond is lost in each interval otherwise
	assert.Equal(t, time.Hour, s.due(s.total))
}

func TestScheduleRemembersWhatIsOverdue(t *testing.T) {
	s := newSchedule(1000, time.Second)
	for want := range 501 {
		due, ok := s.take(500 * time.Millisecond)
		require.True(t, ok)
		assert.Equal(t, time.Duration(want)*time.Millisecond, due)
	}
	_, ok := s.take(500 * time.Millisecond)
	assert.False(t, ok)
}

func TestResponseLength(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nDate: x\r\nContent-Length: 12\r\nServer: y\r\n\r\n"
	for end := range head {
		n, err := responseLength([]byte(head[:end]))
		require.NoError(t, err)
		assert.Zero(t, n, head[:end])
	}
	for _, body := range []string{"", "hello", "hello, world"} {
		n, err := responseLength([]byte(head + body))
		require.NoError(t, err)
		assert.Equal(t, len(head)+12, n)
	}
	for _, wrong := range []string{
		"HTTP/1.1 503 Unavailable\r\nContent-Length: 1\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
	} {
		_, err := responseLength([]byte(wrong))
		assert.Error(t, err, wrong)
	}
}

// serve answers on a loopback port, and returns its address.
func serve(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{Handler: handler}
	go srv.Serve(ln)
	t.Cleanup(func() { require.NoError(t, srv.Close()) })
	return ln.Addr().String()
}

func generate(t *testing.T, c Config) (Result, error) {
	t.Helper()
	g, err := newGenerator(c)
	require.NoError(t, err)
	defer g.close()
	err = g.run()
	return g.result(), err
}

const head = "GET / HTTP/1.1\r\nHost: x\r\nId: {uuid}\r\n\r\n"

func TestGenerator(t *testing.T) {
	var requests atomic.Int64
	var malformed atomic.Value
	c := Config{Head: head, Connections: 4, Rate: 500, Warmup: 100 * time.Millisecond, Length: 400 * time.Millisecond}
	c.Address = serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if id := r.Header.Get("Id"); len(id) != 36 || strings.Count(id, "-") != 4 {
			malformed.Store(id)
		}
		_, _ = w.Write(make([]byte, 1800))
	})
	r, err := generate(t, c)
	require.NoError(t, err)
	assert.EqualValues(t, 250, requests.Load())
	assert.Nil(t, malformed.Load())
	assert.Equal(t, 250, r.Requests)
	assert.InDelta(t, 500, r.PerSecond, 0.001)
	assert.Zero(t, r.Unanswered)
	assert.Positive(t, r.P50)
	assert.LessOrEqual(t, r.P50, r.P99)
	assert.LessOrEqual(t, r.P99, r.Max)
}

// A stall of the server counts for every request that was due in it.
func TestNoCoordinatedOmission(t *testing.T) {
	const stall = 300 * time.Millisecond
	var n atomic.Int64
	c := Config{Head: head, Connections: 1, Rate: 200, Length: time.Second}
	c.Address = serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if n.Add(1) == 20 {
			time.Sleep(stall) // the server's, not the test's
		}
		_, _ = w.Write([]byte("token"))
	})
	r, err := generate(t, c)
	require.NoError(t, err)
	assert.GreaterOrEqual(t, r.Max, stall)
	// 60 of 200 requests are due in the stall; a closed loop would have counted one.
	assert.GreaterOrEqual(t, r.P99, stall*8/10)
}

func TestUnansweredRequestsCount(t *testing.T) {
	release := make(chan struct{})
	c := Config{Head: head, Connections: 2, Rate: 100, Length: 100 * time.Millisecond}
	c.Address = serve(t, func(http.ResponseWriter, *http.Request) { <-release })
	r, err := generate(t, c)
	close(release)
	require.NoError(t, err)
	assert.Equal(t, 10, r.Unanswered)
	assert.True(t, r.Saturated(c.Rate))
	assert.GreaterOrEqual(t, r.P50, time.Second)
}

func TestGeneratorRefuses(t *testing.T) {
	c := Config{Head: head, Connections: 1, Rate: 100, Length: 100 * time.Millisecond}
	c.Address = serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	_, err := generate(t, c)
	require.ErrorContains(t, err, "503")

	c.Address = serve(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Connection", "close") })
	_, err = generate(t, c)
	require.ErrorContains(t, err, "closed a connection")
}

func TestTrustworthy(t *testing.T) {
	assert.True(t, Result{P99: 2 * time.Millisecond, LagP99: time.Millisecond}.Trustworthy())
	assert.False(t, Result{P99: 2 * time.Millisecond, LagP99: 2 * time.Millisecond}.Trustworthy())
}
