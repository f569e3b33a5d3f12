package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// startPages serves a handler on all loopback addresses until the test ends, and
// returns the port.
func startPages(t *testing.T, handler http.HandlerFunc) (port int) {
	t.Helper()
	ln, err := net.Listen("tcp4", "0.0.0.0:0")
	require.NoError(t, err)
	tcp := ln.(*net.TCPListener)
	p := &page{handler: handler, log: slog.New(slog.DiscardHandler)}
	serving := &component{run: func(ctx context.Context) { assert.NoError(t, p.serve(ctx, tcp)) }}
	serving.Start(t.Context())
	t.Cleanup(func() {
		serving.Stop() // waits until each connection has been released
		_ = ln.Close()
	})
	return tcp.Addr().(*net.TCPAddr).Port
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

// dialFrom connects to 127.0.0.1 from an address, which makes it another host's as
// far as the server can tell.
func dialFrom(t *testing.T, from string, port int) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.DialContext(t.Context(), "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	return conn
}

// exchange sends bytes, and returns all that comes until the connection ends.
func exchange(conn net.Conn, request string) (answer string, err error) {
	if _, err := io.WriteString(conn, request); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

const get = "GET /page HTTP/1.1\r\nHost: node\r\n\r\n"

func TestPageServerSpeaksHTTP(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /page", hello)
	mux.HandleFunc("GET /none", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not now", http.StatusServiceUnavailable) })
	port := startPages(t, mux.ServeHTTP)
	for name, tc := range map[string]struct {
		request string
		status  int
		body    string
	}{
		"page":            {get, 200, "hello"},
		"bare line feeds": {"GET /page HTTP/1.0\n\n", 200, "hello"},
		"HEAD":            {"HEAD /page HTTP/1.1\r\nHost: node\r\n\r\n", 200, ""},
		"unavailable":     {"GET /none HTTP/1.1\r\nHost: node\r\n\r\n", 503, "not now\n"},
		"unknown":         {"GET /x HTTP/1.1\r\nHost: node\r\n\r\n", 404, "404 page not found\n"},
		"POST":            {"POST /page HTTP/1.1\r\nHost: node\r\nContent-Length: 3\r\n\r\nabc", 405, "Method Not Allowed\n"},
		"pipelined":       {get + get, 200, "hello"},
		"keep-alive":      {"GET /page HTTP/1.1\r\nHost: node\r\nConnection: keep-alive\r\n\r\n", 200, "hello"},
		"not HTTP":        {"\x16\x03\x01\r\n\r\n", 400, "400 Bad Request"},
		"64 lines":        {"GET /page HTTP/1.0\r\n" + strings.Repeat("a: b\r\n", 62) + "\r\n", 200, "hello"},
		"65 lines":        {"GET /page HTTP/1.0\r\n" + strings.Repeat("a: b\r\n", 63) + "\r\n", 400, "400 Bad Request"},
		"4 KiB":           {"GET /page HTTP/1.0\r\na: " + strings.Repeat("b", 4<<10-23-4) + "\r\n\r\n", 200, "hello"},
		"more than 4 KiB": {"GET /page HTTP/1.0\r\na: " + strings.Repeat("b", 4<<10-23) + "\r\n\r\n", 431, "431 Request Header Fields Too Large"},
	} {
		t.Run(name, func(t *testing.T) {
			answer, err := exchange(dialFrom(t, "127.0.0.1", port), tc.request)
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), &http.Request{Method: strings.Fields(tc.request)[0]})
			require.NoError(t, err, answer)
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			assert.Equal(t, tc.status, resp.StatusCode)
			assert.Equal(t, tc.body, string(body))
			assert.Equal(t, "text/plain; charset=utf-8", resp.Header.Get("Content-Type"))
			if tc.status != 400 && tc.status != 431 { // which net/http writes without
				assert.NotEmpty(t, resp.Header.Get("Date"))
			}
			assert.True(t, resp.Close)
			if name == "HEAD" {
				assert.EqualValues(t, 5, resp.ContentLength)
			}
		})
	}
}

func TestAHandlersPanicEndsOnlyItsConnection(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /page", hello)
	mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("a page") })
	port := startPages(t, mux.ServeHTTP)
	answer, err := exchange(dialFrom(t, "127.0.0.1", port), "GET /panic HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	assert.Empty(t, answer)
	answer, err = exchange(dialFrom(t, "127.0.0.1", port), get)
	require.NoError(t, err)
	assert.Contains(t, answer, "hello")
}

// TestClientThatClosesItsSideIsAnswered is what `busybox nc` does with a request from
// a pipe. A page may have to wait for its turn.
func TestClientThatClosesItsSideIsAnswered(t *testing.T) {
	port := startPages(t, func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(5 * time.Millisecond) // so that the next waits for the end of a pause of 95 ms
		hello(w, r)
	})
	for range 2 {
		conn := dialFrom(t, "127.0.0.1", port)
		_, err := io.WriteString(conn, get)
		require.NoError(t, err)
		require.NoError(t, conn.(*net.TCPConn).CloseWrite())
		answer, err := io.ReadAll(conn)
		require.NoError(t, err)
		assert.Contains(t, string(answer), "hello")
	}
}

func TestOneAddressKeepsNoOtherOut(t *testing.T) {
	port := startPages(t, hello)
	for range 4 {
		dialFrom(t, "127.0.0.2", port)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, Timeout: 30 * time.Second}
	if fifth, err := dialer.DialContext(t.Context(), "tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err == nil { // reset already
		_, err := exchange(fifth, get)
		require.Error(t, err)
	}
	answer, err := exchange(dialFrom(t, "127.0.0.3", port), get)
	require.NoError(t, err)
	assert.Contains(t, answer, "hello")
}

// addressed is a connection between two addresses, and nothing else.
type addressed struct {
	net.Conn
	from, to string
}

func (a addressed) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(a.from)} }
func (a addressed) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.ParseIP(a.to)} }

func TestManyAddressesShareTheConnections(t *testing.T) {
	s := &limitedListener{}
	var releases []func()
	admitted := func(from string) (n int) {
		for range 10 {
			if release, ok := s.admit(addressed{from: from, to: "10.0.0.4"}); ok {
				releases = append(releases, release)
				n++
			}
		}
		return n
	}
	assert.Equal(t, 4, admitted("10.244.0.1"))
	assert.Equal(t, 4, admitted("10.244.0.2"))
	for i := range 22 {
		assert.Equal(t, 1, admitted(fmt.Sprintf("10.244.1.%d", i)), "scarce, so one each")
	}
	assert.Zero(t, admitted("10.244.0.3"))
	assert.Equal(t, 2, admitted("10.0.0.4"), "the node's own")
	assert.Zero(t, admitted("10.0.0.4"))
	for _, release := range releases {
		release()
	}
	assert.Zero(t, s.total)
	assert.Empty(t, s.byAddr)
	assert.Equal(t, 4, admitted("10.0.0.4"))
}

func TestUnixConnectionsHaveNoAddress(t *testing.T) {
	ln, err := listenUnix(t.Context(), t.TempDir()+"/probe.sock")
	require.NoError(t, err)
	defer ln.Close()
	conn, err := net.Dial("unix", ln.Addr().String())
	require.NoError(t, err)
	defer conn.Close()
	accepted, err := ln.Accept()
	require.NoError(t, err)
	defer accepted.Close()
	s := &limitedListener{}
	for i := range maxPageConns + 1 {
		_, ok := s.admit(accepted)
		assert.Equal(t, i < maxPageConns, ok)
	}
}

func TestSlowReadersHoldUpNoOtherPage(t *testing.T) {
	mux := http.NewServeMux()
	rendering := make(chan struct{})
	mux.HandleFunc("GET /page", hello)
	mux.HandleFunc("GET /1MiB", func(w http.ResponseWriter, _ *http.Request) {
		close(rendering)
		_, _ = w.Write(make([]byte, 1<<20))
	})
	port := startPages(t, mux.ServeHTTP)
	_, err := io.WriteString(dialFrom(t, "127.0.0.2", port), "GET /1MiB HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	<-rendering
	start := time.Now()
	answer, err := exchange(dialFrom(t, "127.0.0.3", port), get)
	require.NoError(t, err)
	assert.Contains(t, answer, "hello")
	assert.Less(t, time.Since(start), pageConnTimeout/2)
}

func TestSlowAndSilentClientsAreDisconnected(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /page", hello)
	mux.HandleFunc("GET /8KiB", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 8<<10)) })
	mux.HandleFunc("GET /1MiB", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 1<<20)) })
	port := startPages(t, mux.ServeHTTP)
	var waiting sync.WaitGroup
	for name, tc := range map[string]struct {
		request string
		reads   bool // a little now and then
		after   time.Duration
	}{
		"silent":         {"", false, pageHeadTimeout},
		"half a request": {"GET /page HTTP/1.1\r\nHost", false, pageHeadTimeout},
		// Too much for the socket's buffer, and little enough: in that case the
		// server has nothing more to do, and the kernel would try for minutes.
		"an answer that does not fit": {"GET /1MiB HTTP/1.1\r\nHost: node\r\n\r\n", false, pageConnTimeout},
		"an answer that fits":         {"GET /8KiB HTTP/1.1\r\nHost: node\r\n\r\n", false, pageConnTimeout},
		"an answer read slowly":       {"GET /8KiB HTTP/1.1\r\nHost: node\r\n\r\n", true, pageConnTimeout},
		"a body that does not come":   {"POST /page HTTP/1.1\r\nHost: node\r\nContent-Length: 3\r\n\r\n", false, pageConnTimeout},
	} {
		start := time.Now()
		conn := dialFrom(t, fmt.Sprintf("127.0.1.%d", len(name)), port) // neither reads nor closes
		require.NoError(t, conn.(*net.TCPConn).SetReadBuffer(1<<10))
		waiting.Go(func() {
			_, err := io.WriteString(conn, tc.request)
			assert.NoError(t, err)
			for b := make([]byte, 400); err == nil && tc.reads; time.Sleep(time.Second) {
				_, err = conn.Read(b)
			}
			if tc.reads {
				assert.ErrorIs(t, err, unix.ECONNRESET, name)
			} else {
				assert.NoError(t, awaitReset(conn), name)
			}
			assert.GreaterOrEqual(t, time.Since(start), tc.after, name)
			assert.Less(t, time.Since(start), tc.after+5*time.Second, name)
		})
	}
	waiting.Wait()
}

// awaitReset waits until the connection is reset, without reading from it.
func awaitReset(conn net.Conn) error {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var failure error
	err = raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd)}}
		if _, failure = unix.Poll(poll, 30_000); failure == nil && poll[0].Revents&unix.POLLERR == 0 {
			failure = fmt.Errorf("no reset, but events %#x", poll[0].Revents)
		}
	})
	return errors.Join(err, failure)
}

func TestRenderingTakesATwentiethOfTheTimeAtMost(t *testing.T) {
	for name, tc := range map[string]struct{ rendering, ten time.Duration }{
		"cheap":     {time.Millisecond, 10*time.Millisecond + 9*19*time.Millisecond},
		"expensive": {time.Second, 10*time.Second + 9*maxRenderPause},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				handler := oneAtATime(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls++; time.Sleep(tc.rendering) }))
				req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil)
				start := time.Now()
				for range 10 {
					handler.ServeHTTP(httptest.NewRecorder(), req)
				}
				assert.Equal(t, 10, calls)
				assert.Equal(t, tc.ten, time.Since(start))
				ended, end := context.WithCancel(t.Context())
				end()
				handler.ServeHTTP(httptest.NewRecorder(), req.WithContext(ended))
				assert.Equal(t, 10, calls)
				time.Sleep(time.Hour)
				start = time.Now()
				handler.ServeHTTP(httptest.NewRecorder(), req)
				assert.Equal(t, tc.rendering, time.Since(start), "no pause before the first")
			})
		})
	}
}
