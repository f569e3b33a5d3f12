package proxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/upstream"
)

// echo is an IMDS that says what it was asked for, and reads of a body what it likes.
func echo(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Has("read") {
		_, _ = io.Copy(io.Discard, r.Body)
	}
	w.Header().Set("Content-Type", contentType)
	_, _ = fmt.Fprintf(w, `{"asked":%q}`, r.RequestURI)
}

// Pods share the connections to IMDS. While an excepted pod does its worst there, hiding
// requests in bodies, breaking bodies off, leaving before the answer, others get the
// answers to what they asked, and to nothing else.
func TestResponsesAreNotMixedUp(t *testing.T) {
	imds := httptest.NewServer(http.HandlerFunc(echo))
	defer imds.Close()
	base, err := url.Parse(imds.URL)
	require.NoError(t, err)
	up := upstream.New(upstream.Config{IMDS: base})
	defer up.Close()
	w := newWorld(t, func(c *Config) { c.Upstream, c.MaxConnections, c.MaxConnectionsPerPod = up, 4096, 4096 })

	const rounds = 100
	secret := get("/metadata/identity/oauth2/token?secret")
	length := fmt.Sprint("Content-Length: ", len(secret))
	whole := []string{
		get("/a?read", length) + secret,
		get("/b", length) + secret,
		get("/c", "Transfer-Encoding: chunked") + "zz\r\n" + secret,
		get("/d?read", "Transfer-Encoding: chunked", "Content-Length: 3") + "0\r\n\r\n" + secret,
		get("/e?read", "Expect: 100-continue", length) + secret,
		get("/f", "Connection: Upgrade", "Upgrade: h2c") + secret,
		strings.Replace(get("/g"), "GET", "HEAD", 1) + secret,
		secret + secret + secret,
	}
	broken := []string{ // the rest never comes
		get("/h?read", "Content-Length: 1000") + secret,
		get("/i", "Content-Length: 100000") + secret,
		get("/j?read", "Transfer-Encoding: chunked") + "fff\r\n" + secret,
	}
	var all sync.WaitGroup
	for i, raw := range append(whole, broken...) {
		for _, stay := range []bool{true, false} {
			all.Go(func() {
				for range rounds / 2 {
					c := w.connect(excepted)
					_, err := io.WriteString(c, raw)
					assert.NoError(t, err)
					if stay && i >= len(whole) {
						assert.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
					}
					if stay {
						_, _ = c.r.Peek(1)
					}
					c.Close()
				}
			})
		}
	}
	for _, from := range []string{bound, unbound, alsoBound} {
		all.Go(func() {
			c := w.connect(from)
			for n := range rounds * 4 {
				target := fmt.Sprintf("/metadata/instance/%s/%d", strings.ReplaceAll(from, ".", "-"), n)
				_, err := io.WriteString(c, get(target))
				if !assert.NoError(t, err) {
					return
				}
				resp, err := http.ReadResponse(c.r, nil)
				if !assert.NoError(t, err) {
					return
				}
				var got struct{ Asked string }
				assert.NoError(t, json.NewDecoder(resp.Body).Decode(&got))
				assert.Equal(t, target, got.Asked)
			}
		})
	}
	all.Wait()
	w.waitForOpen(3) // no request of those who left is still at work
}
