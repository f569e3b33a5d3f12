package upstream

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
)

// passed is a request that is passed on; imdstest's faults are for this path.
func passed(ctx context.Context, t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+tokenPath+"?api-version=2018-02-01&resource=r", nil)
	require.NoError(t, err)
	r.Header.Set("Metadata", "true")
	return r
}

// sent is what comes of passing r on: the body, and the first error.
func sent(u *Upstream, r *http.Request) (body string, err error) {
	resp, err := u.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestRoundTripLeavesTheRequestAsItIs(t *testing.T) {
	var got *http.Request
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })))
	r := passed(t.Context(), t)
	_, err := sent(u, r)
	require.NoError(t, err)
	assert.Equal(t, tokenPath+"?api-version=2018-02-01&resource=r", got.RequestURI)
	assert.Equal(t, http.Header{"Metadata": {"true"}}, got.Header, "and nothing else")
	assert.Equal(t, "169.254.169.254", r.URL.Host)
	assert.Equal(t, http.Header{"Metadata": {"true"}}, r.Header)
}

func TestOnlySoManyArePassedOnAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		u, stop := inMemory(t, imds)
		defer stop()
		for range maxPassing {
			imds.Inject(imdstest.Fault{Hang: true})
		}
		ctx, cancel := context.WithCancel(t.Context())
		var hanging sync.WaitGroup
		for range maxPassing {
			hanging.Go(func() {
				_, err := sent(u, passed(ctx, t))
				assert.ErrorIs(t, err, context.Canceled)
			})
		}
		synctest.Wait()
		atOnce, _ := imds.Peak()
		assert.Equal(t, maxPassing, atOnce)

		begin := time.Now()
		_, err := sent(u, passed(t.Context(), t))
		require.ErrorIs(t, err, errBusy)
		assert.Equal(t, passingPatience, time.Since(begin))
		gone, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		_, err = sent(u, passed(gone, t))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = u.Token(t.Context(), asking(key))
		require.NoError(t, err, "tokens do not wait behind what is passed on")

		time.AfterFunc(time.Second, cancel)
		body, err := sent(u, passed(t.Context(), t))
		require.NoError(t, err, "there is room in time")
		assert.NotEmpty(t, body)
		hanging.Wait()
		assert.Empty(t, u.passing, "all places are given back")
	})
}

func TestHowLongIMDSMayTakeForWhatIsPassedOn(t *testing.T) {
	for name, tc := range map[string]struct {
		fault imdstest.Fault
		want  error
	}{
		"the first request for scheduled events": {imdstest.Fault{Delay: 2 * time.Minute}, nil},
		"no answer":                              {imdstest.Fault{Hang: true}, context.DeadlineExceeded},
		"no end of it":                           {imdstest.Fault{Slow: time.Hour}, context.DeadlineExceeded},
		"cut":                                    {imdstest.Fault{Cut: true}, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{})
				u, stop := inMemory(t, imds)
				defer stop()
				imds.Inject(tc.fault)
				_, err := sent(u, passed(t.Context(), t))
				require.ErrorIs(t, err, tc.want)
				assert.Equal(t, 1, imds.Requests())
				assert.Empty(t, u.passing)
			})
		})
	}
}

func TestTokensAndWhatIsPassedOnShareConnections(t *testing.T) {
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
			_, err = sent(u, passed(t.Context(), t))
			require.NoError(t, err)
		}
		assert.EqualValues(t, 1, dials.Load())
	})
}

func TestWhatIMDSNeverAnswersIsNotPassedOn(t *testing.T) {
	for name, tc := range map[string]struct {
		answer string
		want   string
	}{
		"a header without end": {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHeader) + "\r\nContent-Length: 0\r\n\r\n", "exceeded"},
		"a long body":          {fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", maxPassed+1), errLongAnswer.Error()},
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
			_, err := sent(u, passed(t.Context(), t))
			require.ErrorContains(t, err, tc.want)
			assert.Empty(t, u.passing)
		})
	}
}

func TestABodyThatTurnsOutLongIsCut(t *testing.T) {
	for length, want := range map[int]error{maxPassed: nil, maxPassed + 1: errLongAnswer} {
		u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush() // so that its length is not known
			_, _ = io.WriteString(w, strings.Repeat("x", length))
		})))
		_, err := sent(u, passed(t.Context(), t))
		require.ErrorIs(t, err, want)
		assert.Empty(t, u.passing)
	}
}
