package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

// lines is a log.
type lines struct{ testlog.Buffer }

// with returns the lines that contain text.
func (l *lines) with(text string) (found []string) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

// logged makes u write to a log of its own.
func logged(u *Upstream) *lines {
	l := &lines{}
	log := slog.New(slog.NewTextHandler(l, nil))
	u.outage.log, u.spellings.logger = log, log
	return l
}

func TestResourceSpellingIsLoggedOnce(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	u := upstreamOf(t, imds.Start())
	log := logged(u)
	for i := range 3 * maxSpellings {
		k := tokencache.Key{ClientID: known.ClientID, Resource: fmt.Sprintf("https://%d.Example/", i/2)}
		imds.Inject(imdstest.Fault{Edit: func(fields map[string]any) {
			fields["resource"] = strings.TrimSuffix(strings.ToLower(fields["resource"].(string)), "/")
		}})
		token, err := u.Token(t.Context(), asking(k))
		require.NoError(t, err)
		assert.Equal(t, known.ClientID, imdstest.Subject(token.AccessToken))
		assert.Equal(t, fmt.Sprintf("https://%d.example", i/2), token.Resource, "as the service spells it")
	}
	assert.Len(t, log.with("https://7.example"), 1)
	assert.Len(t, log.with("IMDS spells a resource differently"), maxSpellings)
}

// A proxy before IMDS no longer knows whose the idle connections are, and answers 421 on
// any of them. That is no refusal.
func TestRetryOnNewConnection(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Latency: 20 * time.Millisecond})
	u := upstreamOf(t, imds.Start())
	_ = counted(u)
	var all sync.WaitGroup
	for range 5 { // each on a connection of its own, which stays open
		all.Go(func() { _, err := u.Token(t.Context(), asking(key)); assert.NoError(t, err) })
	}
	all.Wait()
	for range 3 {
		imds.ForgetConnections()
		imds.Reset()
		slots := counted(u)
		_, err := u.Token(t.Context(), asking(key))
		require.NoError(t, err)
		calls := imds.Calls()
		require.Len(t, calls, 2)
		assert.Equal(t, []int{421, 200}, []int{calls[0].Status, calls[1].Status})
		slots.check(t, 1) // IMDS has not seen the first try
		_, err = u.Token(t.Context(), asking(key))
		require.NoError(t, err)
	}
}

func TestMisdirectedRequestIsRetriedOnce(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	imds.Inject(imdstest.Fault{Status: 421}, imdstest.Fault{Status: 421})
	u := upstreamOf(t, imds.Start())
	_, err := u.Token(t.Context(), asking(key))
	require.ErrorContains(t, err, "a proxy before IMDS answered 421")
	assert.Equal(t, tokencache.Unavailable, classOf(err))
	assert.Equal(t, 2, imds.Requests())
}

// A proxy's answer is no refusal in the negative cache: once the proxy allows the agent, the
// pod is served as soon as after any outage.
func TestProxyAnswersAreNotCachedAsRefusals(t *testing.T) {
	for _, status := range []int{403, 421} {
		synctest.Test(t, func(t *testing.T) {
			imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
			imds.Inject(imdstest.Fault{Status: status}, imdstest.Fault{Status: status})
			u, stop := inMemory(t, imds)
			defer stop()
			cache := tokencache.New(u.Token, tokencache.Config{})
			defer cache.Close()
			_, err := cache.Get(t.Context(), key, podAddr(1))
			var failure *tokencache.Failure
			require.ErrorAs(t, err, &failure)
			assert.Equal(t, tokencache.Unavailable, failure.Class)
			assert.Equal(t, time.Second, failure.RetryAfter)
			imds.Reset()
			time.Sleep(failure.RetryAfter)
			_, err = cache.Get(t.Context(), key, podAddr(1))
			require.NoError(t, err)
		})
	}
}

// refusing returns a switch that makes connections to IMDS fail.
func refusing(u *Upstream) *atomic.Bool {
	var down atomic.Bool
	dial := u.transport.DialContext
	u.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if down.Load() {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
		}
		return dial(ctx, network, address)
	}
	return &down
}

// ask requests a token of its own for each pod, every second.
func ask(t *testing.T, cache *tokencache.Cache, name string, pods int, lasts time.Duration) {
	t.Helper()
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() {
			for begin := time.Now(); time.Since(begin) < lasts; time.Sleep(time.Second) {
				_, _ = cache.Get(t.Context(), keyFor(fmt.Sprintf("https://%s-%d.example", name, i)), podAddr(i))
			}
		})
	}
	all.Wait()
}

func TestOutageLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		u, stop := inMemory(t, imds)
		defer stop()
		log, down := logged(u), refusing(u)
		cache := tokencache.New(u.Token, tokencache.Config{})
		defer cache.Close()
		ask(t, cache, "before", 3, 2*time.Second)
		require.NoError(t, u.Unavailable())

		u.transport.CloseIdleConnections()
		down.Store(true)
		began := time.Now()
		ask(t, cache, "during", 20, 5*time.Minute)
		require.Len(t, log.with(""), 1, "one warning, however many fail")
		warning := log.with("")[0]
		assert.Contains(t, warning, `level=WARN msg="IMDS gives no tokens; those in memory are served meanwhile" cause="dial tcp: connection refused" since=`+began.Format("2006-01-02T15:04:05"))
		require.ErrorContains(t, u.Unavailable(), "IMDS has given no tokens since "+began.UTC().Format(time.RFC3339))
		require.ErrorContains(t, u.Unavailable(), "): dial tcp: connection refused")

		down.Store(false)
		ask(t, cache, "after", 20, time.Minute)
		require.NoError(t, u.Unavailable())
		require.Len(t, log.with(""), 2, "and one line at its end")
		assert.Regexp(t, `level=INFO msg="IMDS gives tokens again" outage=5m\d*s failed_fetches=\d\d+`, log.with("")[1])
		assert.Empty(t, log.with("client_id"), "quotes no request of a pod")
	})
}

func TestOutage(t *testing.T) {
	type fault = imdstest.Fault
	for name, tc := range map[string]struct {
		faults []fault
		cause  string // "" for no outage
	}{
		"a token":                     {nil, ""},
		"a refusal":                   {once(fault{Status: 400, Body: `{"error":"invalid_request","error_description":"Identity not found"}`}), ""},
		"a throttle":                  {once(fault{Status: 429}), ""},
		"a token that cannot be used": {once(field("client_id", nil)), ""},
		"an answer that is too long":  {once(fault{Status: 200, Body: strings.Repeat(" ", maxAnswer+1)}), ""},
		"one failure, then a token":   {once(fault{Status: 500}), ""},
		"500 always":                  {always(fault{Status: 500}), "IMDS answered 500"},
		"404 always":                  {always(fault{Status: 404}), "IMDS answered 404"},
		"no answer":                   {always(fault{Hang: true}), "no answer within 5s"},
		"cut answers":                 {always(fault{Reset: true}), "EOF"},
		"a proxy that refuses":        {once(fault{Status: 403}), "a proxy before IMDS answered 403"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
				u, stop := inMemory(t, imds)
				defer stop()
				log := logged(u)
				imds.Inject(tc.faults...)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, _ = u.Token(ctx, asking(key))
				if tc.cause == "" {
					require.NoError(t, u.Unavailable())
					assert.Empty(t, log.with(""))
					return
				}
				require.ErrorContains(t, u.Unavailable(), tc.cause)
				assert.Len(t, log.with(tc.cause), 1)
				imds.Reset()
				_, err := u.Token(t.Context(), asking(key))
				require.NoError(t, err)
				require.NoError(t, u.Unavailable())
				assert.Len(t, log.with("IMDS gives tokens again"), 1)
			})
		})
	}
}

// A key that IMDS cannot serve, while it serves others, is no outage.
func TestOneFailingKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		u, stop := inMemory(t, imds)
		defer stop()
		log := logged(u)
		imds.Inject(imdstest.Fault{Delay: 2 * time.Second, Status: 503, RetryAfter: "60"})
		var failing sync.WaitGroup
		failing.Go(func() { _, err := u.Token(t.Context(), asking(key)); assert.Error(t, err) })
		time.Sleep(time.Second)
		_, err := u.Token(t.Context(), asking(keyFor("other")))
		require.NoError(t, err)
		failing.Wait()
		require.NoError(t, u.Unavailable())
		assert.Empty(t, log.with(""))
	})
}

// A fetch continues after its callers have left, and so notices that IMDS hangs.
func TestOutageWithoutCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
		imds.Inject(always(imdstest.Fault{Hang: true})...)
		u, stop := inMemory(t, imds)
		defer stop()
		cache := tokencache.New(u.Token, tokencache.Config{})
		defer cache.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := cache.Get(ctx, key, netip.Addr{})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, u.Unavailable())
		time.Sleep(fetchTimeout)
		require.ErrorContains(t, u.Unavailable(), "no answer within 5s")
	})
}

// A fetch that Close ends says nothing about IMDS, unless a try had failed before.
func TestCloseDuringFetch(t *testing.T) {
	for name, tc := range map[string]struct {
		after time.Duration
		want  bool
	}{"during the first try": {time.Second, false}, "during the second": {tryTimeout + time.Second, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
				imds.Inject(always(imdstest.Fault{Hang: true})...)
				u, stop := inMemory(t, imds)
				defer stop()
				cache := tokencache.New(u.Token, tokencache.Config{})
				go func() { _, _ = cache.Get(t.Context(), key, netip.Addr{}) }()
				time.Sleep(tc.after)
				cache.Close()
				assert.Equal(t, tc.want, u.Unavailable() != nil)
			})
		})
	}
}

// An IMDS that fails now and then must not fill the log.
func TestOutageLogIsRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &lines{}
		o := outage{log: slog.New(slog.NewTextHandler(log, nil))}
		down := errors.New("down")
		for range 120 {
			o.record(time.Now(), down)
			require.Error(t, o.err())
			time.Sleep(time.Second)
			o.record(time.Now(), nil)
			require.NoError(t, o.err())
			time.Sleep(time.Second)
		}
		assert.Len(t, log.with("level=WARN"), 4)
		assert.Len(t, log.with("level=INFO"), 4)
	})
}

func TestUnknownIdentity(t *testing.T) {
	words := `{"error":"invalid_request","error_description":"Identity not found"}`
	for want, e := range map[bool]*Error{
		true:  newError(http.StatusBadRequest, "", []byte(words), time.Now()),
		false: newError(http.StatusBadRequest, "", []byte(`{"error":"invalid_resource"}`), time.Now()),
	} {
		e.Source = sourceIMDS
		assert.Equal(t, want, e.UnknownIdentity())
		e.Source = sourceEntra
		assert.False(t, e.UnknownIdentity())
	}
}
