package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

func TestTheWaitForATurnIsNotTakenFromTheTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Latency: 4 * time.Second})
		u, stop := inMemory(t, imds)
		defer stop()
		limiter := turns{wait: time.Minute}
		_, err := u.Token(t.Context(), tokencache.Request{Key: key, Turn: limiter.take})
		require.NoError(t, err)
		limiter.check(t, 1)
	})
}

func TestNoTurnNoRequest(t *testing.T) {
	throttled := errors.New("throttled for an hour")
	for name, tc := range map[string]struct {
		turn tokencache.Turn
		want error
	}{
		"the fetch ends":      {(&turns{wait: time.Minute}).take, context.DeadlineExceeded},
		"the limiter refuses": {func(context.Context) (func(time.Duration), error) { return nil, throttled }, throttled},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
				u, stop := inMemory(t, imds)
				defer stop()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				begin := time.Now()
				_, err := u.Token(ctx, tokencache.Request{Key: key, Turn: tc.turn})
				require.ErrorIs(t, err, tc.want)
				assert.Zero(t, imds.Requests())
				if errors.Is(tc.want, throttled) {
					assert.Zero(t, time.Since(begin), "not tried again")
				}
			})
		})
	}
}

func TestALimiterThatRefusesLaterIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{})
		imds.Inject(imdstest.Fault{Status: 404})
		u, stop := inMemory(t, imds)
		defer stop()
		refused := errors.New("throttled for an hour")
		var limiter turns
		_, err := u.Token(t.Context(), tokencache.Request{Key: key, Turn: func(ctx context.Context) (func(time.Duration), error) {
			if limiter.taken > 0 {
				return nil, refused
			}
			return limiter.take(ctx)
		}})
		require.ErrorIs(t, err, refused)
		assert.ErrorContains(t, err, "404", "what came before it is told too")
		limiter.check(t, 1)
	})
}

// net/http sends a GET again by itself if it was sent on a connection that turns out to
// be closed; IMDS would count two requests, the limiter one.
func TestARequestThatIsSentAgainHasATurnOfItsOwn(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	u := upstreamOf(t, imds.Start())
	var limiter turns
	for range 5 {
		_, err := u.Token(t.Context(), tokencache.Request{Key: key, Turn: limiter.take})
		require.NoError(t, err)
		imds.Inject(imdstest.Fault{Reset: true}) // on the connection that is kept
	}
	limiter.check(t, imds.Requests())
	assert.Equal(t, 9, imds.Requests())
}

func TestNobodyAtIMDSsAddress(t *testing.T) {
	u := New(Config{IMDS: &url.URL{Scheme: "http", Host: nobody}})
	defer u.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := u.Token(ctx, asking(key))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.ErrorContains(t, err, "connection refused", "the cause is not hidden by the deadline")
}

func TestFreshBypassesIMDSsOwnCache(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Cached: true})
	u := upstreamOf(t, imds.Start())
	ask := asking(key)
	var tokens []string
	for _, ask.Fresh = range []bool{false, false, true, false} {
		token, err := u.Token(t.Context(), ask)
		require.NoError(t, err)
		tokens = append(tokens, token.AccessToken)
	}
	assert.Equal(t, tokens[0], tokens[1])
	assert.NotEqual(t, tokens[1], tokens[2])
	assert.Equal(t, tokens[2], tokens[3])
	for i, call := range imds.Calls() {
		target, err := url.Parse(call.Target)
		require.NoError(t, err)
		assert.Equal(t, i == 2, target.Query().Get("bypass_cache") == "true")
	}
}

// A cold node with everything in it: IMDS counts what the limiter let through, each try.
func TestIMDSIsNotAskedMoreThanItAllows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}, Latency: 100 * time.Millisecond})
		for range 20 {
			imds.Inject(imdstest.Fault{Status: 404}, imdstest.Fault{Cut: true}, imdstest.Fault{Reset: true}, imdstest.Fault{Slow: time.Second}, imdstest.Fault{})
		}
		u, stop := inMemory(t, imds)
		defer stop()
		cache := tokencache.New(u.Token, tokencache.Config{})
		defer cache.Close()
		var pods sync.WaitGroup
		for i := range 100 {
			pods.Go(func() {
				_, err := cache.Get(t.Context(), tokencache.Key{ClientID: known.ClientID, Resource: fmt.Sprint(i)}, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
				assert.NoError(t, err)
			})
		}
		pods.Wait()
		atOnce, perSecond := imds.Peak()
		assert.Equal(t, 160, imds.Requests())
		assert.LessOrEqual(t, atOnce, 4)
		assert.LessOrEqual(t, perSecond, 18)
	})
}
