package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy/listener"
	"github.com/podidentity/nmi/tokencache"
)

// withID is a request for a token with a request ID.
func withID(n int) string {
	return get(tokenURL, fmt.Sprintf("x-ms-client-request-id: 0a1b2c3d-0000-4000-8000-%012x", n))
}

// exchange sends a request, and returns the response, whose body has been read, and its token's
// subject.
func (c *keptAlive) exchange(t *testing.T, raw string) (resp *http.Response, subject string) {
	t.Helper()
	_, err := io.WriteString(c, raw)
	require.NoError(t, err)
	resp, err = http.ReadResponse(c.r, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, tokenSubject(string(body))
}

// fastPath waits until so many requests have been answered on the fast path: they are counted once
// the response is written.
func (w *world) fastPath(requests uint64, what string) {
	w.t.Helper()
	w.eventually(func() bool { return w.server.Stats().FastPath >= requests }, what)
	assert.Equal(w.t, requests, w.server.Stats().FastPath, what)
}

func TestFastPath(t *testing.T) {
	w := newWorld(t, nil)
	c := w.connect(bound)
	requests := uint64(0)
	ask := func(c *keptAlive, raw string, fast bool) {
		t.Helper()
		if fast {
			requests++
		}
		resp, subject := c.exchange(t, raw)
		assert.Equal(t, 200, resp.StatusCode)
		if strings.Contains(raw, tokenURL) {
			assert.Equal(t, one.ClientID, subject)
		}
		w.fastPath(requests, raw)
	}
	ask(c, withID(1), false)
	ask(c, withID(1), false) // it is known, and the connection goes to the fast path
	for i := range 3 {
		ask(c, withID(i+2), true)
	}
	ask(c, strings.Replace(withID(1), "0a1b2c3d", "0A1B2C3D", 1), true)
	ask(c, get(tokenURL), false) // without an ID: another head
	ask(c, get(tokenURL), false)
	ask(c, get(tokenURL), true)
	ask(c, withID(9), true)
	ask(c, get(versions), false)
	ask(c, get(versions), false)
	ask(c, withID(9), false) // http.Server has the connection, and gives it back
	ask(c, withID(9), true)

	again := w.connect(bound)
	ask(again, withID(10), true) // with its first request
	other := w.connect(alsoBound)
	ask(other, withID(11), false) // heads of one pod are not known of others
	ask(other, withID(11), false)
	ask(other, withID(11), true)

	closing := get(tokenURL, "Connection: close")
	ask(w.connect(bound), closing, false)
	last := w.connect(bound)
	ask(last, closing, true)
	assert.True(t, last.ended(t))
	assert.Equal(t, 3, w.imds.Requests(), "one for the token")
}

// What is not exactly a known head goes to http.Server.
func TestNotTheFastPath(t *testing.T) {
	w := newWorld(t, nil)
	known := w.connect(bound)
	for range 3 {
		known.exchange(t, withID(1))
	}
	w.fastPath(1, "")
	id := "0a1b2c3d-0000-4000-8000-000000000001"
	for name, raw := range map[string]string{
		"the ID is too short":                        strings.Replace(withID(1), id, id[1:], 1),
		"the ID has a character that GUIDs have not": strings.Replace(withID(1), id, "g"+id[1:], 1),
		"a header follows the ID":                    strings.Replace(withID(1), id, id+"\r\nX: y", 1),
		"a space before the ID":                      strings.Replace(withID(1), id, " "+id[1:], 1),
		"a body":                                     strings.Replace(withID(1), "\r\n\r\n", "\r\nContent-Length: 1\r\n\r\nx", 1),
		"two requests at once":                       withID(1) + withID(2),
		"another resource":                           strings.Replace(withID(1), "vault", "other", 1),
		"a parameter more":                           strings.Replace(withID(1), " HTTP", "&x=y HTTP", 1),
	} {
		t.Run(name, func(t *testing.T) {
			resp, _ := w.connect(bound).exchange(t, raw)
			assert.Equal(t, 200, resp.StatusCode)
			w.fastPath(1, "")
		})
	}
}

// Heads that http.Server has parsed, but are not known afterwards.
func TestUnusualHeadsAreNotKnown(t *testing.T) {
	long := get(tokenURL, "X: "+strings.Repeat("x", listener.MaxHead))
	for name, raw := range map[string]string{
		"long":                         long,
		"HTTP/1.0":                     strings.Replace(get(tokenURL), "HTTP/1.1", "HTTP/1.0", 1),
		"Expect":                       get(tokenURL, "Expect: 100-continue"),
		"Upgrade":                      get(tokenURL, "Upgrade: h2c"),
		"Connection names a header":    get(tokenURL, "Connection: metadata"),
		"Connection twice":             get(tokenURL, "Connection: keep-alive", "Connection: keep-alive"),
		"Content-Length":               get(tokenURL, "Content-Length: 0"),
		"Trailer":                      get(tokenURL, "Trailer: x"),
		"folded lines":                 get(tokenURL, "X: y\r\n z"),
		"LF alone":                     strings.ReplaceAll(get(tokenURL), "\r\n", "\n"),
		"a tab":                        get(tokenURL, "X:\ty"),
		"a byte that is not ASCII":     get(tokenURL, "X: \x80"),
		"a cached token is not wanted": get(tokenURL + "&bypass_cache=true"),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			c := w.connect(bound)
			for range 4 {
				_, err := io.WriteString(c, raw)
				require.NoError(t, err)
				resp, err := http.ReadResponse(c.r, nil)
				require.NoError(t, err)
				_, err = io.Copy(io.Discard, resp.Body)
				require.NoError(t, err)
				assert.Equal(t, 200, resp.StatusCode)
				if resp.Close {
					c = w.connect(bound)
				}
			}
			assert.Zero(t, w.server.Stats().FastPath)
		})
	}
}

// A head is known; whether its token may be had is decided for each request.
func TestFastPathAuthorizesEachRequest(t *testing.T) {
	var untrusted atomic.Bool
	pod := resolvertest.Pod("bound", bound, "both")
	excepted := resolvertest.With(pod.DeepCopy(), func(p *corev1.Pod) { p.Labels["app"] = "addon" })
	for name, tc := range map[string]struct {
		change  func(*resolvertest.Cluster)
		status  int
		subject string
	}{
		"the pod is gone":              {func(c *resolvertest.Cluster) { c.Delete(pod) }, http.StatusServiceUnavailable, ""},
		"another identity comes first": {func(c *resolvertest.Cluster) { c.Modify(resolvertest.Binding("a", "other", "one")) }, http.StatusOK, two.ClientID},
		"an exception applies":         {func(c *resolvertest.Cluster) { c.Modify(excepted) }, http.StatusOK, "the node's"},
		"the source is not trusted":    {func(*resolvertest.Cluster) { untrusted.Store(true) }, http.StatusBadRequest, ""},
	} {
		t.Run(name, func(t *testing.T) {
			untrusted.Store(false)
			cluster := newCluster()
			w := newWorld(t, func(c *Config) {
				r, err := podresolver.New(cluster.Sources(), podresolver.Config{Node: resolvertest.Node, PodWait: time.Millisecond, Logger: c.Logger})
				require.NoError(t, err)
				c.Pods = run(t, r)
				c.CheckSource = func(netip.Addr, int, *podresolver.Pod) error {
					if untrusted.Load() {
						return errors.New("the interface of another pod")
					}
					return nil
				}
			})
			c := w.connect(bound)
			for range 3 {
				resp, subject := c.exchange(t, get(tokenURL))
				require.Equal(t, 200, resp.StatusCode)
				require.Equal(t, one.ClientID, subject)
			}
			w.fastPath(1, "")
			before := w.server.cfg.Pods.Owner(netip.MustParseAddr(bound))
			tc.change(cluster)
			if !untrusted.Load() {
				w.eventually(func() bool { return w.server.cfg.Pods.Owner(netip.MustParseAddr(bound)) != before }, "the change has arrived")
			}
			resp, subject := c.exchange(t, get(tokenURL))
			assert.Equal(t, tc.status, resp.StatusCode)
			if tc.subject == "the node's" {
				assert.NotContains(t, []string{"", one.ClientID, two.ClientID}, subject)
			} else {
				assert.Equal(t, tc.subject, subject)
			}
			w.fastPath(1, "")
		})
	}
}

// A token that is not in memory is fetched, on the way of all others.
func TestFastPathWithoutToken(t *testing.T) {
	w := newWorld(t, nil)
	c := w.connect(bound)
	for i := range 9 { // one more than heads are known
		for range 3 {
			resp, _ := c.exchange(t, get(tokenURL+fmt.Sprint(i)))
			assert.Equal(t, 200, resp.StatusCode)
		}
	}
	assert.Equal(t, 9, w.imds.Requests())
	w.fastPath(9, "")
	c.exchange(t, get(tokenURL+"0"))
	w.fastPath(9, "it has been forgotten")
}

func TestFastPathWhileDraining(t *testing.T) {
	w := newWorld(t, nil)
	idle, busy := w.connect(bound), w.connect(bound)
	for range 3 {
		idle.exchange(t, get(tokenURL))
		busy.exchange(t, get(tokenURL))
	}
	w.fastPath(4, "on both")
	w.stop()
	w.eventually(w.server.draining.Load, "it stops")
	resp, _ := busy.exchange(t, get(tokenURL))
	assert.Equal(t, 200, resp.StatusCode)
	assert.True(t, resp.Close)
	assert.True(t, busy.ended(t))
	assert.True(t, idle.ended(t))
	w.running.Wait()
	assert.Zero(t, w.server.Stats().Connections.Open)
}

// A client that sends one request after the other, and reads no response.
func TestSlowReaderOnTheFastPath(t *testing.T) {
	w := newWorld(t, nil)
	c := w.slowReader(bound)
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	first := w.connect(bound)
	first.exchange(t, get(tokenURL)) // so that the head is known
	require.NoError(t, first.Close())
	began := time.Now()
	for sent := uint64(0); ; sent++ {
		if _, err := io.WriteString(c, get(tokenURL)); err != nil {
			break
		}
		deadline := time.Now().Add(2 * writeTimeout)
		for w.server.Stats().FastPath <= sent && w.server.Stats().Connections.Open > 0 && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	assert.Positive(t, w.server.Stats().FastPath)
	assert.Less(t, time.Since(began), 3*writeTimeout)
	w.waitForOpen(0)
}

// A connection that http.Server gives back while the server stops must not be waited for, or
// sync.WaitGroup panics.
func TestNoGoroutinesAfterStop(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	f := newFront(ln, nil)
	served := make(chan struct{})
	require.True(t, f.goServe(func() { close(served) }))
	f.stop()
	assert.False(t, f.goServe(func() { t.Error("served") }))
	f.serving.Wait()
	<-served
	require.NoError(t, f.Close())
}

// A connection may be idle for as long as http.Server would let it, whoever serves it.
func TestIdleTimeoutOfTheFastPath(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	pods := runResolver(t, podresolver.Config{Logger: log})
	synctest.Test(t, func(t *testing.T) {
		tokens := tokencache.New(func(context.Context, tokencache.Request) (*tokencache.Token, error) {
			return &tokencache.Token{AccessToken: "t", ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
		}, tokencache.Config{})
		defer tokens.Close()
		s, ln := New(Config{Pods: pods, Tokens: tokens, Logger: log}), newPipes()
		ctx, stop := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- s.Serve(ctx, ln) }()
		pod := ln.dial(bound)
		c := &keptAlive{pod, bufio.NewReader(pod)}
		for i := range 5 { // known after the first, taken back at the second
			resp, _ := c.exchange(t, withID(i))
			assert.Equal(t, 200, resp.StatusCode)
			time.Sleep(idleTimeout/2 - time.Second)
		}
		synctest.Wait()
		assert.Equal(t, uint64(3), s.Stats().FastPath)
		time.Sleep(idleTimeout)
		_, err := c.r.ReadByte()
		require.ErrorIs(t, err, io.EOF)
		_ = pod.Close()
		stop()
		require.NoError(t, <-served)
	})
}
