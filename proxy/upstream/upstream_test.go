package upstream

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/tokencache"
)

var (
	known = imdstest.Identity{ClientID: "c1d2e3f4-0000-4000-8000-000000000001", ResourceID: "/subscriptions/s/resourcegroups/g/providers/microsoft.managedidentity/userassignedidentities/one"}
	key   = tokencache.Key{ClientID: known.ClientID, Resource: "https://vault.azure.net/"}
)

// asking is a request that never has to wait for its turn.
func asking(k tokencache.Key) tokencache.Request {
	return tokencache.Request{Key: k, Turn: func(context.Context) (func(time.Duration), error) {
		return func(time.Duration) {}, nil
	}}
}

func upstreamOf(t *testing.T, srv *httptest.Server) *Upstream {
	t.Helper()
	t.Cleanup(srv.Close)
	base, err := url.Parse(srv.URL)
	require.NoError(t, err)
	u := New(Config{IMDS: base, UserAgent: "nmi/test"})
	t.Cleanup(u.Close)
	return u
}

func TestTokenByClientIDAndByResourceID(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
	u := upstreamOf(t, imds.Start())
	for _, k := range []tokencache.Key{key, {ResourceID: known.ResourceID, Resource: key.Resource}} {
		token, err := u.Token(t.Context(), asking(k))
		require.NoError(t, err)
		assert.Equal(t, known.ClientID, imdstest.Subject(token.AccessToken))
		assert.Equal(t, key.Resource, token.Resource)
		assert.Equal(t, "Bearer", token.TokenType)
		assert.WithinDuration(t, time.Now().Add(24*time.Hour), token.ExpiresOn, 5*time.Second)
	}
}

func TestAKeyWithoutIdentityIsNeverSent(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	u := upstreamOf(t, imds.Start())
	_, err := u.Token(t.Context(), asking(tokencache.Key{Resource: "r"}))
	require.Error(t, err)
	assert.Zero(t, imds.Requests(), "IMDS would have answered with the node's identity")
}

func TestRefusalsKeepTheServicesWords(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	u := upstreamOf(t, imds.Start())
	_, err := u.Token(t.Context(), asking(key))
	var refused *Error
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, &Error{Status: 400, Code: "invalid_request", Description: "Identity not found"}, refused)

	imds.Inject(imdstest.Fault{Status: 429, RetryAfter: "7", Body: `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`})
	before := imds.Requests()
	_, err = u.Token(t.Context(), asking(key))
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, 429, refused.Status)
	assert.Equal(t, 7*time.Second, refused.RetryAfter)
	assert.Equal(t, 1, imds.Requests()-before, "a throttled service is left alone")
}

func TestPassingFailuresAreTriedAgain(t *testing.T) {
	for _, status := range []int{404, 410, 500, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{known}})
			imds.Inject(imdstest.Fault{Status: status, Body: "<html>not now</html>"})
			u := upstreamOf(t, imds.Start())
			token, err := u.Token(t.Context(), asking(key))
			require.NoError(t, err)
			assert.Equal(t, known.ClientID, imdstest.Subject(token.AccessToken))
			assert.Equal(t, 2, imds.Requests())
		})
	}
}

func TestTheContextBoundsAllRetries(t *testing.T) {
	imds := imdstest.NewServer(imdstest.Config{})
	imds.Inject(imdstest.Fault{Status: 503}, imdstest.Fault{Status: 503, RetryAfter: "60"})
	u := upstreamOf(t, imds.Start())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := u.Token(ctx, asking(key))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Equal(t, 1, imds.Requests())

	_, err = u.Token(t.Context(), asking(key))
	var refused *Error
	require.ErrorAs(t, err, &refused)
	assert.Equal(t, &Error{Status: 503, RetryAfter: time.Minute}, refused, "a long Retry-After is the caller's to keep")
	assert.Equal(t, 2, imds.Requests())
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

func TestRoundTripKeepsPathAndHeaders(t *testing.T) {
	var got *http.Request
	u := upstreamOf(t, httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		_, _ = io.WriteString(w, "ok")
	})))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://169.254.169.254/metadata/instance?api-version=2021-02-01", nil)
	require.NoError(t, err)
	req.Header.Set("Metadata", "true")
	resp, err := u.RoundTrip(req)
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, "/metadata/instance?api-version=2021-02-01", got.RequestURI)
	assert.Equal(t, "true", got.Header.Get("Metadata"))
	assert.Equal(t, "169.254.169.254", req.URL.Host, "the caller's request is left as it was")
}

// answerWith replaces fields of a good answer; nil drops the field.
func answerWith(fields map[string]any) string {
	all := map[string]any{
		"access_token": `"secret"`, "client_id": `"` + key.ClientID + `"`, "expires_in": `"86399"`, "expires_on": `"1700086399"`,
		"ext_expires_in": `"86399"`, "not_before": `"1700000000"`, "resource": `"` + key.Resource + `"`, "token_type": `"Bearer"`,
	}
	for name, value := range fields {
		all[name] = value
	}
	var b strings.Builder
	for name, value := range all {
		if value != nil {
			fmt.Fprintf(&b, `,%q:%v`, name, value)
		}
	}
	return "{" + b.String()[1:] + "}"
}

func TestParseToken(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for name, tc := range map[string]struct {
		fields map[string]any
		err    string
	}{
		"as the service sends it":       {nil, ""},
		"numbers for strings":           {map[string]any{"expires_on": 1700086399, "expires_in": 86399, "ext_expires_in": 0}, ""},
		"no expires_on":                 {map[string]any{"expires_on": nil}, ""},
		"client_id in capitals":         {map[string]any{"client_id": `"` + strings.ToUpper(key.ClientID) + `"`}, ""},
		"empty not_before":              {map[string]any{"not_before": `""`}, ""},
		"null ext_expires_in":           {map[string]any{"ext_expires_in": "null"}, ""},
		"no token":                      {map[string]any{"access_token": `""`}, "no access_token"},
		"a token with a quote":          {map[string]any{"access_token": `"secret\""`}, "characters that no bearer token has"},
		"no type":                       {map[string]any{"token_type": nil}, "no token_type"},
		"another resource":              {map[string]any{"resource": `"https://management.azure.com/"`}, "it is for resource"},
		"another identity":              {map[string]any{"client_id": `"other"`}, "it is for client_id"},
		"no expiry":                     {map[string]any{"expires_on": nil, "expires_in": nil}, "neither expires_on nor expires_in"},
		"expired":                       {map[string]any{"expires_on": `"1699999999"`}, "check the node's clock"},
		"expires in a year":             {map[string]any{"expires_on": `"1731536000"`}, "check the node's clock"},
		"expires_in beyond all numbers": {map[string]any{"expires_on": nil, "expires_in": `"9223372036854775807"`}, "check the node's clock"},
		"a date for a number":           {map[string]any{"expires_on": `"11/21/2026 10:00"`}, "whole number of seconds"},
		"a list for a token":            {map[string]any{"access_token": `["a"]`}, "not the JSON of a token"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := parseToken([]byte(answerWith(tc.fields)), key, now)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				assert.NotContains(t, err.Error(), "secret")
				return
			}
			require.NoError(t, err)
			assert.Equal(t, now.Add(86399*time.Second), token.ExpiresOn)
			assert.Equal(t, token.ExpiresOn, token.ExtExpiresOn)
			assert.Equal(t, now, token.NotBefore)
		})
	}
}

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "5": 5 * time.Second, "-5": 0, "99999999": time.Hour, "soon": 0,
		"Sat, 21 Nov 2026 10:00:30 GMT": 30 * time.Second, "Sat, 21 Nov 2026 09:00:00 GMT": 0,
	} {
		assert.Equal(t, want, parseRetryAfter(value, now), value)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add([]byte(answerWith(nil)))
	f.Add([]byte(`{"access_token":"secret","expires_in":-1}`))
	now := time.Unix(1_700_000_000, 0)
	f.Fuzz(func(t *testing.T, body []byte) {
		token, err := parseToken(body, key, now)
		if err != nil {
			return
		}
		if token.AccessToken == "" || strings.ContainsAny(token.AccessToken, "\"\\\x00\n ") || token.Resource != key.Resource || !token.ExpiresOn.After(now) ||
			token.ExpiresOn.Sub(now) > longestLife || token.ExtExpiresOn.Before(token.ExpiresOn) {
			t.Fatalf("accepted %q", body)
		}
	})
}
