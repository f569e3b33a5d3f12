package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/upstream"
)

// Many a server takes it that a GET has no body, and reads the body as the next request
// (CL.0). Were IMDS one of them, the head of a request left open in a body would become
// the head of whatever comes next on that connection. So nothing comes next on it.
func TestConnectionToIMDSIsNotReusedAfterABody(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go answerWithoutBodies(c)
		}
	}()
	up := upstream.New(upstream.Config{IMDS: &url.URL{Scheme: "http", Host: ln.Addr().String()}})
	defer up.Close()
	w := newWorld(t, func(c *Config) { c.Upstream = up })

	const left = "GET /metadata/identity/oauth2/token?the-nodes HTTP/1.1\r\nMetadata: true\r\nX: "
	for _, headers := range [][]string{
		{fmt.Sprint("Content-Length: ", len(left))},
		{fmt.Sprint("Content-Length: ", len(left)), "Connection: keep-alive"},
	} {
		c := w.connect(excepted)
		_, err := io.WriteString(c, get("/metadata/scheduledevents", headers...)+left)
		require.NoError(t, err)
		resp, err := http.ReadResponse(c.r, nil)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode)
		for range 3 {
			_, body := w.get(unbound, versions)
			assert.Equal(t, versions, body)
		}
	}
}

// answerWithoutBodies answers each request on a connection with its target.
func answerWithoutBodies(c net.Conn) {
	defer c.Close()
	for r := textproto.NewReader(bufio.NewReader(c)); ; {
		line, err := r.ReadLine()
		if err != nil {
			return
		}
		if _, err := r.ReadMIMEHeader(); err != nil {
			return
		}
		var method, target string
		_, _ = fmt.Sscan(line, &method, &target)
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(target), target)
	}
}
