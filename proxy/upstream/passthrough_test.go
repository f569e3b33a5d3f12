package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache/limiter"
)

// passThroughRequest is for the token path, to which imdstest's faults apply.
func passThroughRequest(ctx context.Context, t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+tokenPath+"?api-version=2018-02-01&resource=r", nil)
	require.NoError(t, err)
	r.Header.Set("Metadata", "true")
	return r
}

// roundTrip passes r through, and returns the body of the answer.
func roundTrip(u *Upstream, r *http.Request) (body string, err error) {
	resp, err := u.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestRoundTripDoesNotChangeTheRequest(t *testing.T) {
	var got *http.Request
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })))
	r := passThroughRequest(t.Context(), t)
	_, err := roundTrip(u, r)
	require.NoError(t, err)
	assert.Equal(t, tokenPath+"?api-version=2018-02-01&resource=r", got.RequestURI)
	assert.Equal(t, http.Header{"Metadata": {"true"}}, got.Header, "and nothing else")
	assert.Equal(t, "169.254.169.254", r.URL.Host)
	assert.Equal(t, http.Header{"Metadata": {"true"}}, r.Header)
}

// otherPath is not the token path for an Upstream, but for imdstest and its faults.
const otherPath = "/METADATA/identity/oauth2/token"

func TestPassThroughLimits(t *testing.T) {
	for name, tc := range map[string]struct {
		path string
		most int
	}{
		"token path":                         {tokenPath, passThroughTokenSlots},
		"token path with a slash at its end": {tokenPath + "/", passThroughTokenSlots},
		"others":                             {otherPath, passThroughSlots},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
				u, stop := inMemory(t, imds)
				defer stop()
				request := func(ctx context.Context, path string) *http.Request {
					r := passThroughRequest(ctx, t)
					r.URL.Path = path
					return r
				}
				for range tc.most {
					imds.Inject(imdstest.Fault{Hang: true})
				}
				ctx, cancel := context.WithCancel(t.Context())
				var hanging sync.WaitGroup
				for range tc.most {
					hanging.Go(func() {
						_, err := roundTrip(u, request(ctx, tc.path))
						assert.ErrorIs(t, err, context.Canceled)
					})
				}
				synctest.Wait()
				atOnce, _ := imds.Peak()
				assert.Equal(t, tc.most, atOnce)

				begin := time.Now()
				_, err := roundTrip(u, request(t.Context(), tc.path))
				require.ErrorContains(t, err, "are being passed through already")
				assert.Equal(t, slotTimeout, time.Since(begin))
				gone, leave := context.WithTimeout(t.Context(), time.Second)
				defer leave()
				_, err = roundTrip(u, request(gone, tc.path))
				require.ErrorIs(t, err, context.DeadlineExceeded)
				_, err = u.Token(t.Context(), asking(key))
				require.NoError(t, err, "the agent's own requests do not wait for those that are passed through")
				for _, path := range []string{tokenPath, otherPath} {
					if path != strings.TrimSuffix(tc.path, "/") {
						begin = time.Now()
						_, err = roundTrip(u, request(t.Context(), path))
						require.NoError(t, err)
						assert.Less(t, time.Since(begin), time.Second, "nor does %s", path)
					}
				}

				time.AfterFunc(time.Second, cancel)
				body, err := roundTrip(u, request(t.Context(), tc.path))
				require.NoError(t, err, "a slot is free in time")
				assert.NotEmpty(t, body)
				hanging.Wait()
				assertIdle(t, u)
			})
		})
	}
}

// assertIdle checks that all slots and all memory have been released.
func assertIdle(t *testing.T, u *Upstream) {
	t.Helper()
	for l, size := range map[*limiter.Limiter]int{u.passThrough: passThroughSlots, u.passThroughTokens: passThroughTokenSlots} {
		begin := time.Now()
		for range size {
			release, err := l.Acquire(t.Context(), begin, func() ([]netip.Addr, time.Time) { return []netip.Addr{podAddr(0)}, begin })
			if assert.NoError(t, err, "all slots are free") {
				defer release(0)
			}
		}
	}
	u.bodies.mu.Lock()
	defer u.bodies.mu.Unlock()
	assert.EqualValues(t, maxBodies, u.bodies.free)
	assert.Empty(t, u.bodies.byAddr)
}

// An unread answer takes its address's memory, and no slot.
func TestSlowReadersHoldNoSlot(t *testing.T) {
	answer := strings.Repeat("x", 200<<10)
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, answer) })))
	var unread []*http.Response
	for i := range 2 * passThroughSlots {
		r := passThroughRequest(t.Context(), t)
		r.URL.Path, r.RemoteAddr = "/metadata/instance", fmt.Sprintf("10.0.0.%d:1", i/8)
		resp, err := u.RoundTrip(r)
		if errors.Is(err, ErrBodyBudget) {
			continue
		}
		require.NoError(t, err)
		unread = append(unread, resp)
	}
	assert.Greater(t, len(unread), passThroughSlots/2)
	for _, resp := range unread {
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		assert.Equal(t, answer, string(body), "all of it is there")
		require.NoError(t, resp.Body.Close())
		require.NoError(t, resp.Body.Close(), "once more")
	}
	assertIdle(t, u)
}

// An address may take as much as is free, so that some is left for the next.
func TestBodyBudget(t *testing.T) {
	const size, one = 1 << 20, 1 << 10
	b := newBodyBudget(size)
	for i := range byte(50) {
		from := netip.AddrFrom4([4]byte{10, 0, 0, i})
		got := 0
		for b.reserve(from, one) {
			got += one
		}
		left := int64(size)
		for _, n := range b.byAddr {
			left -= n
		}
		assert.Equal(t, left, b.free)
		if i < 8 {
			assert.Equal(t, size>>(i+1), got, "half of what the one before left")
		}
		assert.GreaterOrEqual(t, b.free, int64(got))
	}
}

func TestPassThroughTimeout(t *testing.T) {
	for name, tc := range map[string]struct {
		fault imdstest.Fault
		want  error
	}{
		"the first request for scheduled events": {imdstest.Fault{Delay: 2 * time.Minute}, nil},
		"no answer":                              {imdstest.Fault{Hang: true}, context.DeadlineExceeded},
		"an endless answer":                      {imdstest.Fault{Slow: time.Hour}, context.DeadlineExceeded},
		"cut":                                    {imdstest.Fault{Cut: true}, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{})
				u, stop := inMemory(t, imds)
				defer stop()
				imds.Inject(tc.fault)
				_, err := roundTrip(u, passThroughRequest(t.Context(), t))
				require.ErrorIs(t, err, tc.want)
				assert.Equal(t, 1, imds.Requests())
				assertIdle(t, u)
			})
		})
	}
}

func TestPassThroughSharesConnections(t *testing.T) {
	// In a bubble: net/http gives up a connection if it has not noticed within 50 ms of
	// the answer that the request was written.
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		u, stop := inMemory(t, imds)
		defer stop()
		var dials atomic.Int32
		dial := u.transport.DialContext
		u.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, network, address)
		}
		for range 3 {
			_, err := u.Token(t.Context(), asking(key))
			require.NoError(t, err)
			_, err = roundTrip(u, passThroughRequest(t.Context(), t))
			require.NoError(t, err)
		}
		assert.EqualValues(t, 1, dials.Load())
	})
}

func TestMalformedAnswersAreNotPassedThrough(t *testing.T) {
	for name, tc := range map[string]struct {
		answer string
		want   string
	}{
		"a header without end": {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHeader) + "\r\nContent-Length: 0\r\n\r\n", "exceeded"},
		"a long body":          {fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", maxPassThroughBody+1), ErrBodyTooLong.Error()},
		"another protocol":     {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", errSwitched.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if assert.NoError(t, err) {
					defer conn.Close()
					_, _ = io.WriteString(conn, tc.answer) // it hangs up on a long one
				}
			})))
			_, err := roundTrip(u, passThroughRequest(t.Context(), t))
			require.ErrorContains(t, err, tc.want)
			assertIdle(t, u)
		})
	}
}

func TestPassThroughBodyOfUnknownLength(t *testing.T) {
	for length, want := range map[int]error{maxPassThroughBody: nil, maxPassThroughBody + 1: ErrBodyTooLong} {
		u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush() // so that its length is not known
			_, _ = io.WriteString(w, strings.Repeat("x", length))
		})))
		_, err := roundTrip(u, passThroughRequest(t.Context(), t))
		require.ErrorIs(t, err, want)
		assertIdle(t, u)
	}
}

// If a metadata security proxy no longer knows whose an idle connection is (421), the
// request is sent again on a new one.
func TestPassThroughOnANewConnection(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	u := upstreamOf(t, imds.Start())
	for _, path := range []string{tokenPath, "/metadata/versions"} {
		for range 2 {
			r := passThroughRequest(t.Context(), t)
			r.URL.Path = path
			body, err := roundTrip(u, r)
			require.NoError(t, err)
			assert.NotEmpty(t, body)
			imds.ForgetConnections()
		}
	}
	var statuses []int
	for _, call := range imds.Calls() {
		statuses = append(statuses, call.Status)
	}
	assert.Equal(t, []int{200, 421, 200, 200, 421, 200}, statuses)
	assertIdle(t, u)
}

// An answer of the proxy is an error that says what to allow.
func TestPassThroughRefusedByAProxy(t *testing.T) {
	for name, tc := range map[string]struct {
		method   string
		answer   imdstest.Fault
		requests int
		want     string // in the error; "" if the answer is passed through
	}{
		"421 twice":          {"GET", imdstest.Fault{Status: 421}, 2, "a proxy before IMDS answered 421 (Misdirected Request); if this node has the Metadata Security Protocol (GuestProxyAgent), allow this agent's process GET " + tokenPath},
		"421 with a body":    {"POST", imdstest.Fault{Status: 421}, 1, "allow this agent's process POST " + tokenPath},
		"403 without a body": {"GET", imdstest.Fault{Status: 403}, 1, "a proxy before IMDS answered 403 (Forbidden)"},
		"403 of IMDS's":      {"GET", imdstest.Fault{Status: 403, Body: `{"error":"forbidden"}`}, 1, ""},
		"403 to HEAD":        {"HEAD", imdstest.Fault{Status: 403}, 1, ""},
		"404 without a body": {"GET", imdstest.Fault{Status: 404}, 1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int32
			u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				w.WriteHeader(tc.answer.Status)
				_, _ = io.WriteString(w, tc.answer.Body)
			})))
			r := passThroughRequest(t.Context(), t)
			if r.Method = tc.method; tc.method == "POST" {
				r.Body, r.ContentLength = io.NopCloser(strings.NewReader("{}")), 2
			}
			_, err := roundTrip(u, r)
			if tc.want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tc.want)
			}
			assert.EqualValues(t, tc.requests, requests.Load())
			assertIdle(t, u)
		})
	}
}
