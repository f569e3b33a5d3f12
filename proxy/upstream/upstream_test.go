package upstream

import (
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

func TestTokenByClientIDAndByResourceID(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	u := upstreamOf(t, imds.Start())
	for _, k := range []tokencache.Key{key, {ResourceID: known.ResourceID, Resource: key.Resource}} {
		token, err := u.Token(t.Context(), asking(k))
		require.NoError(t, err)
		assert.Equal(t, known.ClientID, imdstest.Subject(token.AccessToken))
		assert.Equal(t, key.Resource, token.Resource)
		assert.Equal(t, "Bearer", token.TokenType)
		assert.Equal(t, 24*time.Hour, token.ExpiresIn)
		assert.WithinDuration(t, time.Now().Add(24*time.Hour), token.ExpiresOn, time.Minute)
	}
}

func TestAKeyWithoutIdentityIsNeverSent(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	u := upstreamOf(t, imds.Start())
	_, err := u.Token(t.Context(), asking(tokencache.Key{Resource: "r"}))
	require.Error(t, err)
	assert.Zero(t, imds.Requests(), "IMDS would have answered with the node's identity")
}

// As an SDK would, but for the name.
func TestATokenRequestHasTheHeadersItNeeds(t *testing.T) {
	var got http.Header
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		w.WriteHeader(http.StatusBadRequest)
	})))
	_, err := u.Token(t.Context(), asking(key))
	require.Error(t, err)
	assert.Equal(t, http.Header{"Metadata": {"true"}, "User-Agent": {"nmi/test"}}, got)
}

func TestRefusalsKeepTheServicesWords(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	u := upstreamOf(t, imds.Start())
	_, err := u.Token(t.Context(), asking(key))
	var refused *Error
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, &Error{Source: "IMDS", Status: 400, Code: "invalid_request", Description: "Identity not found"}, refused)
	assert.Equal(t, "IMDS answered 400 invalid_request: Identity not found", refused.Error())
}

func TestEnvironmentProxyAndRedirectsAreNotFollowed(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("NO_PROXY", "")
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the redirect was followed")
	}))
	defer elsewhere.Close()
	u := upstreamOf(t, httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound)))
	_, err := u.Token(t.Context(), asking(key))
	var refused *Error
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, http.StatusFound, refused.Status)
	assert.Nil(t, u.transport.Proxy, "net/http asks no proxy for a loopback address, so that the above does not tell")
}

func TestAnAnswerWithoutEndIsNotReadToItsEnd(t *testing.T) {
	var sent atomic.Int64
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		chunk := make([]byte, 64<<10)
		for sent.Load() < 1<<30 {
			n, err := w.Write(chunk)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})))
	_, err := u.Token(t.Context(), asking(key))
	require.ErrorContains(t, err, "cannot be used")
	assert.Less(t, sent.Load(), int64(64<<20))
}
