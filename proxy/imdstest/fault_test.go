package imdstest

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const askForToken = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r"

func get(ctx context.Context, t *testing.T, url string) (*http.Response, string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	require.NoError(t, err)
	req.Header.Set("Metadata", "true")
	resp, err := (&http.Transport{DisableKeepAlives: true, DisableCompression: true}).RoundTrip(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

func TestFaultsAsAClientSeesThem(t *testing.T) {
	s := NewServer(Config{})
	srv := s.Start()
	defer srv.Close()
	url := srv.URL + askForToken
	ask := func(f Fault) (*http.Response, string, error) {
		s.Inject(f)
		return get(t.Context(), t, url)
	}

	resp, body, err := ask(Fault{Status: 503, RetryAfter: "7", Body: "<html>", Type: "text/html"})
	require.NoError(t, err)
	assert.Equal(t, []any{503, "7", "text/html", "<html>"}, []any{resp.StatusCode, resp.Header.Get("Retry-After"), resp.Header.Get("Content-Type"), body})

	_, _, err = ask(Fault{Reset: true})
	require.ErrorIs(t, err, syscall.ECONNRESET)

	resp, body, err = ask(Fault{Cut: true})
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	assert.Len(t, body, int(resp.ContentLength)/2)

	resp, body, err = ask(Fault{Gzip: true})
	require.NoError(t, err)
	assert.Equal(t, "gzip", resp.Header.Get("Content-Encoding"))
	assert.True(t, strings.HasPrefix(body, "\x1f\x8b"))

	begin := time.Now()
	_, body, err = ask(Fault{Slow: 50 * time.Millisecond, Edit: func(fields map[string]any) { fields["resource"] = "other" }})
	require.NoError(t, err)
	assert.GreaterOrEqual(t, time.Since(begin), 49*time.Millisecond)
	var fields map[string]string
	require.NoError(t, json.Unmarshal([]byte(body), &fields))
	assert.Equal(t, "other", fields["resource"])
	assert.Equal(t, Node, Subject(fields["access_token"]))

	resp, _, err = ask(Fault{})
	require.NoError(t, err)
	assert.Equal(t, 200, resp.StatusCode)
	assert.Equal(t, 6, s.Requests())
	assert.Equal(t, 4, s.Tokens(), "some of them not fit for use")
}

func TestAHangEndsWithTheClientOrTheServer(t *testing.T) {
	s := NewServer(Config{})
	s.Inject(Fault{Hang: true}, Fault{Hang: true}, Fault{Hang: true})
	srv := s.Start()
	came := func(n int) {
		t.Helper()
		require.Eventually(t, func() bool { return s.Requests() == n }, 30*time.Second, time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients sync.WaitGroup
	clients.Go(func() {
		_, _, err := get(ctx, t, srv.URL+askForToken)
		assert.ErrorIs(t, err, context.Canceled)
	})
	came(1)
	cancel()
	clients.Wait()

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	stop := s.Serve(ln)
	for _, url := range []string{srv.URL, "http://" + ln.Addr().String()} {
		clients.Go(func() {
			_, _, err := get(t.Context(), t, url+askForToken)
			assert.Error(t, err)
		})
	}
	came(3)
	srv.Close()
	stop()
	clients.Wait()
}

func TestPeak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p peak
		arrive := func(n int, after time.Duration) {
			time.Sleep(after)
			for range n {
				p.arrive(time.Now())
			}
		}
		arrive(3, 0)
		arrive(2, 900*time.Millisecond)
		assert.Equal(t, 5, p.perSecond)
		arrive(2, 100*time.Millisecond) // a second after the first three
		assert.Equal(t, 5, p.perSecond)
		arrive(4, 899*time.Millisecond)
		assert.Equal(t, 8, p.perSecond, "in a second that no clock's begins")
		assert.Equal(t, 11, p.atOnce)
		for range 1000 {
			arrive(1, 300*time.Millisecond)
		}
		assert.Equal(t, 8, p.perSecond)
		assert.LessOrEqual(t, cap(p.recent), 64, "what is over is forgotten")
	})
}

func TestPeakCountsRequestsForTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that all come within a second
		s := NewServer(Config{})
		ask := func(target string) {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
			r.Header.Set("Metadata", "true")
			s.ServeHTTP(httptest.NewRecorder(), r)
		}
		for range 3 {
			ask(askForToken)
			ask("/metadata/versions")
		}
		s.Inject(Fault{Status: 500})
		ask(askForToken)
		atOnce, perSecond := s.Peak()
		assert.Equal(t, 1, atOnce, "one after the other")
		assert.Equal(t, 4, perSecond)
		s.Reset()
		atOnce, perSecond = s.Peak()
		assert.Zero(t, atOnce+perSecond)
	})
}

func TestACachedTokenIsTheSameUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Config{Cached: true, Lifetime: time.Hour})
		token := func(subject, resource string, fresh bool) (token, expiresIn string) {
			fields := s.tokenFields(subject, resource, fresh)
			return fields["access_token"].(string), fields["expires_in"].(string)
		}
		first, in := token("a", "r", false)
		assert.Equal(t, "3600", in)
		other, _ := token("b", "r", false)
		assert.NotEqual(t, first, other)
		time.Sleep(10 * time.Minute)
		again, in := token("a", "r", false)
		assert.Equal(t, first, again)
		assert.Equal(t, "3000", in)
		fresh, in := token("a", "r", true)
		assert.NotEqual(t, first, fresh)
		assert.Equal(t, "3600", in)
		time.Sleep(time.Hour)
		last, _ := token("a", "r", false)
		assert.NotEqual(t, fresh, last)
	})
}
