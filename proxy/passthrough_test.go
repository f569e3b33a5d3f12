package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/upstream"
)

// plainIMDS is a listener in IMDS's place, whose end of each connection a test holds
// in its hands.
type plainIMDS struct {
	*world
	host  string
	conns chan net.Conn
}

func newPlainIMDS(t *testing.T) *plainIMDS {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	p := &plainIMDS{host: ln.Addr().String(), conns: make(chan net.Conn, 1)}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			p.conns <- conn
		}
	}()
	up := upstream.New(upstream.Config{IMDS: &url.URL{Scheme: "http", Host: p.host}})
	t.Cleanup(up.Close)
	p.world = newWorld(t, func(c *Config) { c.Upstream = up })
	return p
}

// pod is a connection of the excepted pod, on which nothing may take long.
func (p *plainIMDS) pod() *keptAlive {
	p.t.Helper()
	c := p.connect(excepted)
	require.NoError(p.t, c.SetDeadline(time.Now().Add(10*time.Second)))
	return c
}

// accept is the connection that carries a request to IMDS.
func (p *plainIMDS) accept() *keptAlive {
	p.t.Helper()
	select {
	case conn := <-p.conns:
		p.t.Cleanup(func() { _ = conn.Close() })
		require.NoError(p.t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		return &keptAlive{conn, bufio.NewReader(conn)}
	case <-time.After(patience):
		p.t.Fatal("nothing came")
		return nil
	}
}

func (c *keptAlive) write(t *testing.T, text string) {
	t.Helper()
	_, err := io.WriteString(c, text)
	require.NoError(t, err)
}

// expect reads as many bytes as want has, and compares them.
func (c *keptAlive) expect(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.r, got)
	require.NoError(t, err, "after %q", got[:n])
	require.Equal(t, want, string(got))
}

// The requests are spelled in the order that net/http uses, which is no matter of
// meaning (RFC 9110, section 5.3). Everything else must arrive to the byte, and
// nothing more, and the answer likewise; but for what is said of the connection itself,
// on which nothing follows a body.
func TestPassThroughIsUnchanged(t *testing.T) {
	const answer = "HTTP/1.1 418 I'm a teapot\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\nContent-Type: text/x\r\n" +
		"Date: Sat, 21 Nov 2026 10:00:30 GMT\r\nServer: IMDS/150.870.65.1\r\nX-Odd: a\r\nX-Odd: b\r\n\r\n\x1f\x8b\x00\x01\x02"
	for name, raw := range map[string]string{
		"plain":                  "GET /metadata/instance?api-version=2021-02-01 HTTP/1.1\r\nHost: HOST\r\nMetadata: true\r\n\r\n",
		"no header at all":       "GET /metadata/versions HTTP/1.1\r\nHost: HOST\r\n\r\n",
		"of an SDK":              "GET /metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net/ HTTP/1.1\r\nHost: HOST\r\nUser-Agent: azsdk-go\r\nAccept: application/json\r\nAccept-Encoding: gzip, br\r\nMetadata: true\r\nX-Ms-Client-Request-Id: 1\r\n\r\n",
		"X-Forwarded-For":        "GET /metadata/versions HTTP/1.1\r\nHost: HOST\r\nForwarded: for=1.2.3.4\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 5.6.7.8\r\nX-Forwarded-Host: h\r\nX-Forwarded-Proto: https\r\n\r\n",
		"an odd query":           "GET /metadata/versions?a=%zz;b&&c=%2f+%20 HTTP/1.1\r\nHost: HOST\r\n\r\n",
		"an odd path":            "GET /metadata//x%2fy/%7e/./;z HTTP/1.1\r\nHost: HOST\r\nMetadata: true\r\n\r\n",
		"a body":                 "POST /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.1\r\nHost: HOST\r\nContent-Length: 35\r\nContent-Type: application/json\r\nMetadata: true\r\n\r\n{\"StartRequests\":[{\"EventId\":\"x\"}]}",
		"an empty body":          "POST /metadata/scheduledevents HTTP/1.1\r\nHost: HOST\r\nContent-Length: 0\r\nMetadata: true\r\n\r\n",
		"a body in chunks":       "PUT /metadata/x HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\nMetadata: true\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"as long as it may be":   "POST /metadata/x HTTP/1.1\r\nHost: HOST\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat("x", maxBody),
		"a method of its own":    "PROPFIND /metadata/x HTTP/1.1\r\nHost: HOST\r\nDepth: 1\r\n\r\n",
		"cookies and two values": "GET /metadata/x HTTP/1.1\r\nHost: HOST\r\nAccept: a\r\nAccept: b\r\nCookie: c=d\r\nVia: 1.0 x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlainIMDS(t)
			raw := strings.Replace(raw, "HOST", p.host, 1)
			pod := p.pod()
			pod.write(t, raw)
			imds := p.accept()
			const last = "Connection: close\r\n"
			ends := !strings.HasSuffix(raw, "\r\n\r\n") || strings.Contains(raw, "chunked")
			if ends {
				host := "Host: " + p.host + "\r\n"
				raw = strings.Replace(raw, host, host+last, 1)
			}
			imds.expect(t, raw)
			assert.Zero(t, imds.r.Buffered(), "and nothing after it")
			imds.write(t, answer)
			if ends {
				got, err := io.ReadAll(pod.r)
				require.NoError(t, err)
				assert.Equal(t, answer, strings.Replace(string(got), last, "", 1))
				return
			}
			pod.expect(t, answer)
			assert.Zero(t, pod.r.Buffered())
		})
	}
}

// A client that is slow to send takes nothing of IMDS's time, nor one that is slow to read.
func TestPassThroughIsWhole(t *testing.T) {
	p := newPlainIMDS(t)
	pod := p.pod()
	const head = "POST /metadata/x HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
	pod.write(t, fmt.Sprintf(head, "imds")+"5\r\nfirst\r\n")
	other := p.pod()
	other.write(t, "GET /metadata/y HTTP/1.1\r\nHost: imds\r\n\r\n")
	p.accept().expect(t, "GET /metadata/y HTTP/1.1\r\nHost: "+p.host+"\r\n\r\n") // the first has not come so far
	pod.write(t, "6\r\nsecond\r\n0\r\n\r\n")
	imds := p.accept()
	imds.expect(t, strings.Replace(fmt.Sprintf(head, p.host), "\r\nTransfer", "\r\nConnection: close\r\nTransfer", 1)+"b\r\nfirstsecond\r\n0\r\n\r\n")
	const answer = "HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 10:00:30 GMT\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"
	imds.write(t, strings.Replace(answer, "Date", "Content-Type: text/x\r\nDate", 1))
	imds.write(t, "3\r\ntwo\r\n0\r\n\r\n")
	resp, err := http.ReadResponse(pod.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, []string{"chunked"}, resp.TransferEncoding)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	assert.Equal(t, "onetwo", string(body))
}

func TestPassThroughCanceledByClient(t *testing.T) {
	p := newPlainIMDS(t)
	pod := p.pod()
	const head = "GET /metadata/x HTTP/1.1\r\nHost: %s\r\n\r\n"
	pod.write(t, fmt.Sprintf(head, "imds"))
	imds := p.accept()
	imds.expect(t, fmt.Sprintf(head, p.host))
	require.NoError(t, pod.Close())
	_, err := imds.r.ReadByte()
	require.ErrorIs(t, err, io.EOF)
}

func TestPassThroughRequestTooLong(t *testing.T) {
	const refusal = `{"error":"invalid_request","error_description":"The request body is longer than 64 KiB"}`
	p := newPlainIMDS(t)
	long := strings.Repeat("x", maxBody+1)

	resp, body := p.send(excepted, request("POST", "/metadata/x", "Content-Length: 65537")+long)
	assert.Equal(t, 413, resp.StatusCode)
	assert.Equal(t, refusal, body)
	assert.Equal(t, contentType, resp.Header.Get("Content-Type"))
	assert.Empty(t, p.conns, "it says so before")

	resp, body = p.send(excepted, request("POST", "/metadata/x", "Transfer-Encoding: chunked")+fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(long), long))
	assert.Equal(t, 413, resp.StatusCode)
	assert.Equal(t, refusal, body)
	assert.Empty(t, p.conns)
}

func TestPassThroughResponseTooLong(t *testing.T) {
	p := newPlainIMDS(t)
	pod := p.pod()
	pod.write(t, "GET /metadata/x HTTP/1.1\r\nHost: imds\r\n\r\n")
	imds := p.accept()
	_, err := http.ReadRequest(imds.r)
	require.NoError(t, err)
	imds.write(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	go func() {
		chunk := fmt.Sprintf("10000\r\n%s\r\n", strings.Repeat("x", 0x10000))
		for {
			if _, err := io.WriteString(imds, chunk); err != nil {
				return
			}
		}
	}()
	resp, err := http.ReadResponse(pod.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	assert.Equal(t, http.StatusBadGateway, resp.StatusCode)
	assert.JSONEq(t, `{"error":"bad_gateway","error_description":"The metadata service's response is longer than 1 MiB"}`, string(body))
}

func TestPassThroughWithoutResponse(t *testing.T) {
	p := newPlainIMDS(t)
	pod := p.pod()
	pod.write(t, "GET /metadata/x HTTP/1.1\r\nHost: imds\r\n\r\n")
	require.NoError(t, p.accept().Close())
	resp, err := http.ReadResponse(pod.r, nil)
	require.NoError(t, err)
	assert.Equal(t, 503, resp.StatusCode)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
}

// heldIMDS answers when it is released, and counts the requests that wait.
type heldIMDS struct {
	waiting atomic.Int32
	release chan struct{}
}

func newHeldIMDS() *heldIMDS { return &heldIMDS{release: make(chan struct{})} }

func (w *world) waitForIMDS(imds *heldIMDS, requests int32) {
	w.t.Helper()
	w.eventually(func() bool { return imds.waiting.Load() == requests }, "%d requests at IMDS", requests)
}

func (h *heldIMDS) RoundTrip(r *http.Request) (*http.Response, error) {
	h.waiting.Add(1)
	<-h.release
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("{}")), Request: r}, nil
}

func TestPassThroughLimitPerPod(t *testing.T) {
	imds := newHeldIMDS()
	w := newWorld(t, func(c *Config) { c.Upstream = imds })
	const target = "/metadata/versions"
	codes := make(chan int, maxPassThrough+1)
	var asking sync.WaitGroup
	ask := func(from string) {
		asking.Go(func() {
			resp, _ := w.get(from, target)
			codes <- resp.StatusCode
		})
	}
	for range maxPassThrough {
		ask(bound)
	}
	w.waitForIMDS(imds, maxPassThrough)
	resp, body := w.get(bound, target)
	assert.Equal(t, http.StatusTooManyRequests, resp.StatusCode)
	assert.Equal(t, "1", resp.Header.Get("Retry-After"))
	assert.JSONEq(t, `{"error":"invalid_request","error_description":"Too many requests at once"}`, body)
	ask(alsoBound)
	w.waitForIMDS(imds, maxPassThrough+1)
	close(imds.release)
	asking.Wait()
	for range maxPassThrough + 1 {
		assert.Equal(t, 200, <-codes)
	}
	w.waitForOpen(0) // all are closed
	for range maxPassThrough {
		resp, _ := w.get(bound, target)
		assert.Equal(t, 200, resp.StatusCode, "each was released")
	}
}

// A header that some server might read as another's name decides nothing here, and must
// not decide anything there.
func TestPassThroughDropsOddHeaders(t *testing.T) {
	p := newPlainIMDS(t)
	c := p.connect(bound)
	require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	c.write(t, "GET /metadata/versions HTTP/1.1\r\nHost: h\r\nTransfer_Encoding: chunked\r\nContent.Length: 5\r\nMetadata: true\r\nX-1: y\r\n\r\n")
	p.accept().expect(t, "GET /metadata/versions HTTP/1.1\r\nHost: "+p.host+"\r\nMetadata: true\r\nX-1: y\r\n\r\n")
}

func TestPassThroughMalformedBody(t *testing.T) {
	p := newPlainIMDS(t)
	c := p.pod()
	c.write(t, "POST /metadata/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
	resp, err := http.ReadResponse(c.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
	assert.True(t, resp.Close)
}

// See ServeHTTP for why these end their connections.
func TestInformationalResponseKeepsNoConnectionOpen(t *testing.T) {
	for _, raw := range []string{
		"POST /metadata/x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
		"GET /metadata/x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
	} {
		for _, first := range []string{"100 Continue", "103 Early Hints"} {
			p := newPlainIMDS(t)
			c := p.pod()
			c.write(t, raw)
			imds := p.accept()
			_, err := http.ReadRequest(imds.r)
			require.NoError(t, err)
			imds.write(t, "HTTP/1.1 "+first+"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
			all, err := io.ReadAll(c.r)
			require.NoError(t, err, "it stays open")
			assert.Contains(t, string(all), " 200 OK\r\n")
			assert.NotContains(t, string(all), "Early Hints", "it may come when net/http writes 100 Continue")
		}
	}
}
