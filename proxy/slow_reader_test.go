package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
)

// writeTimeout is proxy/listener's, of each write of a response.
const writeTimeout = 5 * time.Second

// slowReader is a connection of a client whose kernel takes as little as it can, and in
// small pieces, as over a network; nil if there is no place for it.
func (w *world) slowReader(from string) net.Conn {
	w.t.Helper()
	dialer := net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0)),
		Control: func(_, _ string, c syscall.RawConn) error {
			var failure error
			err := c.Control(func(fd uintptr) {
				failure = errors.Join(
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 0),
					unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, 536),
				)
			})
			return errors.Join(err, failure)
		},
	}
	c, err := dialer.DialContext(w.t.Context(), "tcp", w.addr)
	if errors.Is(err, unix.ECONNRESET) { // the server had no place, and said so before that returned
		return nil
	}
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// Four pods that leave eight long answers each unread: as many as IMDS may be asked at
// once. Others are served all the same: excepted pods' tokens, and instance metadata.
func TestUnreadResponsesDoNotBlockOthers(t *testing.T) {
	tokens := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{one}})
	long := `{"x":"` + strings.Repeat("x", 300<<10) + `"}`
	var asked atomic.Int64
	imds := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/metadata/instance/long") {
			asked.Add(1)
			rw.Header().Set("Content-Length", fmt.Sprint(len(long)))
			_, _ = io.WriteString(rw, long)
			return
		}
		tokens.ServeHTTP(rw, r)
	}))
	defer imds.Close()
	base, err := url.Parse(imds.URL)
	require.NoError(t, err)
	up := upstream.New(upstream.Config{IMDS: base})
	defer up.Close()
	w := newWorld(t, func(c *Config) { c.Upstream = up })

	for pod := range 4 {
		for range maxPassThrough {
			c := w.slowReader(netip.AddrFrom4([4]byte{127, 0, 1, byte(pod + 1)}).String())
			_, err := io.WriteString(c, "GET /metadata/instance/long HTTP/1.1\r\nHost: h\r\n\r\n")
			require.NoError(t, err)
		}
	}
	w.eventually(func() bool { return asked.Load() == 4*maxPassThrough }, "all of them are at IMDS")
	began := time.Now()
	for range 20 {
		resp, _ := w.get(excepted, tokenURL)
		assert.Equal(t, 200, resp.StatusCode)
		resp, _ = w.get(unbound, "/metadata/instance?api-version=2021-02-01")
		assert.Equal(t, 200, resp.StatusCode)
	}
	assert.Less(t, time.Since(began), 4*time.Second, "they do not wait for what nobody reads")

	resp, body := w.get(unbound, "/metadata/instance/long")
	assert.Equal(t, 200, resp.StatusCode, "a long one fits beside those")
	assert.Equal(t, long, body)
}

// A client that closes without having read, or acknowledged, what it was sent keeps its
// place among the connections, until that is gone from the kernel, too.
func TestUnacknowledgedResponseKeepsItsPlace(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxConnectionsPerPod = 4 })
	request := "GET " + tokenURL + " HTTP/1.1\r\nHost: h\r\nMetadata: true\r\n"
	for range 8 {
		if c := w.slowReader(bound); c != nil {
			_, _ = io.WriteString(c, strings.Repeat(request+"\r\n", 2)+request+"Connection: close\r\n\r\n")
		}
	}
	w.eventually(func() bool { return w.server.Stats().Connections.Evicted+w.server.Stats().Connections.Refused >= 4 }, "the first have made place")
	assert.LessOrEqual(t, w.server.Stats().Connections.Open, 4)
	began := time.Now()
	w.waitForOpen(0)
	assert.Greater(t, time.Since(began), writeTimeout/2, "its end has been waited for")
	assert.Equal(t, 200, w.connect(bound).ask(t))
}

// A client that sends on and on, and reads nothing, ends when an answer cannot be written.
func TestSlowReaderIsDisconnected(t *testing.T) {
	w := newWorld(t, nil)
	c := w.slowReader(bound)
	began := time.Now()
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	var err error
	for err == nil {
		_, err = io.WriteString(c, get(tokenURL))
	}
	assert.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	assert.Less(t, time.Since(began), 2*writeTimeout)
	w.waitForOpen(0)
}
