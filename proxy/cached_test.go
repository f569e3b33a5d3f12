package proxy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

// accessToken reads the token of an answer.
func accessToken(t *testing.T, body string) string {
	t.Helper()
	var in struct {
		Token string `json:"access_token"`
	}
	require.NoError(t, json.Unmarshal([]byte(body), &in))
	require.NotEmpty(t, in.Token)
	return in.Token
}

func TestBypassCache(t *testing.T) {
	w := newWorld(t, nil)
	_, first := w.get(bound, tokenURL)
	_, second := w.get(bound, tokenURL+"&bypass_cache=True")
	assert.NotEqual(t, accessToken(t, first), accessToken(t, second))
	require.Equal(t, 2, w.imds.Requests())
	calls := w.imds.Calls()
	assert.NotContains(t, calls[0].Target, "bypass_cache")
	assert.Contains(t, calls[1].Target, "bypass_cache=true", "IMDS has a cache too")

	_, third := w.get(bound, tokenURL+"&bypass_cache=true")
	assert.Equal(t, accessToken(t, second), accessToken(t, third), "not again so soon")
	_, fourth := w.get(bound, tokenURL+"&bypass_cache=false")
	assert.Equal(t, accessToken(t, second), accessToken(t, fourth))
	assert.Equal(t, 2, w.imds.Requests())
}

func TestTokenSHA256ToRefresh(t *testing.T) {
	w := newWorld(t, nil)
	_, first := w.get(bound, tokenURL)
	sum := sha256.Sum256([]byte(accessToken(t, first)))
	rejected := tokenURL + "&xms_cc=cp1&token_sha256_to_refresh=" + strings.ToUpper(hex.EncodeToString(sum[:]))
	other := tokenURL + "&token_sha256_to_refresh=" + strings.Repeat("0", 64)

	_, kept := w.get(bound, other)
	assert.Equal(t, accessToken(t, first), accessToken(t, kept), "another's hash changes nothing")
	_, second := w.get(bound, rejected)
	assert.NotEqual(t, accessToken(t, first), accessToken(t, second))
	_, third := w.get(bound, rejected)
	assert.Equal(t, accessToken(t, second), accessToken(t, third), "it has been replaced already")
	assert.Equal(t, 2, w.imds.Requests())
}

func TestResourceTooLong(t *testing.T) {
	w := newWorld(t, nil)
	resp, body := w.get(bound, tokenURL+strings.Repeat("x", 3000))
	assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
	assert.JSONEq(t, `{"error":"invalid_request","error_description":"The resource is too long"}`, body)
	assert.Zero(t, w.imds.Requests())
}

func TestNegativeCache(t *testing.T) {
	w := newWorld(t, nil)
	const unknown = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=nonsense"
	w.imds.Inject(imdstest.Fault{Status: 400, Body: `{"error":"invalid_resource","error_description":"AADSTS500011: nonsense was not found"}`})
	for range 3 {
		resp, body := w.get(bound, unknown)
		assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
		assert.JSONEq(t, `{"error":"invalid_resource","error_description":"AADSTS500011: nonsense was not found"}`, body)
	}
	assert.Equal(t, 1, w.imds.Requests())
	resp, _ := w.get(bound, tokenURL)
	assert.Equal(t, http.StatusOK, resp.StatusCode, "that resource alone")
}

// One pod asks for more than IMDS gives; another comes with one wish.
func TestRateLimitOfOnePod(t *testing.T) {
	w := newWorld(t, nil)
	const many = 60
	codes := make([]int, many)
	var asking sync.WaitGroup
	for i := range many {
		asking.Go(func() {
			resp, body := w.get(bound, tokenURL+strings.Repeat("x", i))
			codes[i] = resp.StatusCode
			if resp.StatusCode == http.StatusTooManyRequests {
				assert.NotEmpty(t, resp.Header.Get("Retry-After"))
				assert.JSONEq(t, `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`, body)
			}
		})
	}
	resp, _ := w.get(alsoBound, tokenURL+"other")
	assert.Equal(t, http.StatusOK, resp.StatusCode)
	asking.Wait()
	count := make(map[int]int)
	for _, code := range codes {
		count[code]++
	}
	assert.GreaterOrEqual(t, count[http.StatusOK], 20, "%v", count)
	assert.Equal(t, many, count[http.StatusOK]+count[http.StatusTooManyRequests], "%v", count)
}

func TestInUse(t *testing.T) {
	w := newWorld(t, nil)
	inUse := InUse(w.server.cfg.Pods)
	of := func(id string) tokencache.Key { return tokencache.Key{ClientID: id, Resource: "any"} }
	addr := netip.MustParseAddr
	assert.True(t, inUse(addr(bound), of(one.ClientID)))
	assert.True(t, inUse(addr(bound), tokencache.Key{ResourceID: two.ResourceID}))
	assert.False(t, inUse(addr(bound), of("another")))
	assert.False(t, inUse(addr(unbound), of(one.ClientID)))
	assert.False(t, inUse(addr(stranger), of(one.ClientID)), "and it does not wait")
}

// No token, not even a hash of one, is ever in the log.
func TestNoTokenInLog(t *testing.T) {
	w := newWorld(t, nil)
	_, body := w.get(bound, tokenURL)
	token := accessToken(t, body)
	sum := sha256.Sum256([]byte(token))
	w.get(bound, tokenURL+"&token_sha256_to_refresh="+hex.EncodeToString(sum[:]))
	assert.NotContains(t, w.log.String(), token[:40])
	assert.NotContains(t, w.log.String(), hex.EncodeToString(sum[:]))
}
