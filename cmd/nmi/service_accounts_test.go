package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

const accountToken = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"

// tokenAPI answers TokenRequests by the pod that they are bound to.
type tokenAPI struct {
	*httptest.Server
	seen []*http.Request
	got  []authenticationv1.TokenRequest
}

func newTokenAPI(t *testing.T) *tokenAPI {
	t.Helper()
	answers := map[string]struct {
		status int
		body   string
	}{
		"ok":          {201, `{"kind":"TokenRequest","status":{"token":"` + accountToken + `"}}`},
		"gone":        {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"pods \"gone\" not found","reason":"NotFound","details":{"name":"gone","kind":"pods"},"code":404}`},
		"no account":  {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"serviceaccounts \"cart\" not found","reason":"NotFound","details":{"name":"cart","kind":"serviceaccounts"},"code":404}`},
		"new account": {409, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"the UID in the token request does not match","reason":"Conflict","details":{"name":"cart","group":"authentication.k8s.io","kind":"TokenRequest"},"code":409}`},
		"again":       {409, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"the UID in the bound object reference does not match","reason":"Conflict","code":409}`},
		"forbidden":   {403, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"User \"nmi\" cannot create serviceaccounts/token","reason":"Forbidden","code":403}`},
		"invalid":     {422, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"may not specify a duration","reason":"Invalid","code":422}`},
		"broken":      {500, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"etcd is away","reason":"InternalError","code":500}`},
		"half":        {201, `{"kind":"TokenRequest","status":{"token":"` + accountToken},
		"empty":       {201, `{"kind":"TokenRequest","status":{}}`},
	}
	a := &tokenAPI{}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var got authenticationv1.TokenRequest
		assert.NoError(t, json.NewDecoder(r.Body).Decode(&got))
		assert.Equal(t, "POST /api/v1/namespaces/shop/serviceaccounts/cart/token", r.Method+" "+r.URL.Path)
		a.seen, a.got = append(a.seen, r), append(a.got, got)
		answer := answers[got.Spec.BoundObjectRef.Name]
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(answer.status)
		_, _ = io.WriteString(w, answer.body)
	}))
	t.Cleanup(a.Close)
	return a
}

// request requests a token that may be bound to these pods.
func (a *tokenAPI) request(t *testing.T, asNode bool, pods ...string) (string, error) {
	t.Helper()
	a.seen, a.got = nil, nil
	tokens, err := newAccountTokens(&rest.Config{Host: a.URL}, federationConfig{audience: defaultAudience, asNode: asNode}, "node1",
		func(account podresolver.ServiceAccount) (bound []podresolver.BoundPod) {
			assert.Equal(t, podresolver.ServiceAccount{Namespace: "shop", Name: "cart", UID: "u"}, account)
			for _, name := range pods {
				bound = append(bound, podresolver.BoundPod{Name: name, UID: "uid-of-" + name})
			}
			return bound
		})
	require.NoError(t, err)
	assert.Nil(t, tokens.client.GetRateLimiter(), "a queue without turns")
	return tokens.request(t.Context(), tokencache.ServiceAccount{Namespace: "shop", Name: "cart", UID: "u"})
}

func TestServiceAccountToken(t *testing.T) {
	// With all that client-go has to say, more than the agent ever logs.
	o := mustParse(t, "--node=n", "--v=10")
	var log bytes.Buffer
	klog.SetSlogLogger(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.Level(-20)})))
	defer func() {
		klog.ClearLogger()
		assert.NoError(t, o.klog.Set("v", "0"))
	}()
	api := newTokenAPI(t)
	token, err := api.request(t, false, "ok", "forbidden")
	require.NoError(t, err)
	assert.Equal(t, accountToken, token)
	require.Len(t, api.got, 1)
	got := api.got[0]
	assert.Equal(t, []string{"api://AzureADTokenExchange"}, got.Spec.Audiences)
	assert.Equal(t, int64(600), *got.Spec.ExpirationSeconds)
	assert.Equal(t, &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "ok", UID: "uid-of-ok"}, got.Spec.BoundObjectRef)
	assert.Equal(t, "u", string(got.UID), "the API server refuses another service account of this name")
	assert.Empty(t, api.seen[0].Header.Get("Impersonate-User"))

	_, err = api.request(t, true, "ok")
	require.NoError(t, err)
	assert.Equal(t, "system:node:node1", api.seen[0].Header.Get("Impersonate-User"))
	assert.Empty(t, api.seen[0].Header.Values("Impersonate-Group"))

	token, err = api.request(t, false, "gone", "again", "ok")
	require.NoError(t, err, "another pod will do")
	assert.Equal(t, accountToken, token)

	for name, tc := range map[string]struct {
		pods    []string
		asNode  bool
		text    string
		forGood bool
		asked   int
	}{
		"no pod":                {nil, false, "no pod of this node that has it is left", false, 0},
		"all gone":              {[]string{"gone", "again", "gone", "ok"}, false, "pods \"gone\" not found", false, 3},
		"no service account":    {[]string{"no account", "ok"}, false, "there is no such service account", true, 1},
		"a new service account": {[]string{"new account", "ok"}, false, "the UID in the token request does not match", false, 1},
		"forbidden":             {[]string{"forbidden", "ok"}, false, "apply deploy/federation/namespace.yaml to namespace shop", true, 1},
		"forbidden to its node": {[]string{"forbidden", "ok"}, true, "the agent may not request it as its node node1; apply deploy/federation/own-node.yaml", true, 1},
		"invalid":               {[]string{"invalid"}, false, "may not specify a duration", true, 1},
		"broken":                {[]string{"broken", "ok"}, false, "requesting its token from the API server: etcd is away", false, 1},
		"half a token":          {[]string{"half"}, false, "not the JSON of a token", false, 1},
		"no token":              {[]string{"empty"}, false, "not the JSON of a token", false, 1},
	} {
		token, err := api.request(t, tc.asNode, tc.pods...)
		require.ErrorContains(t, err, tc.text, name)
		assert.Empty(t, token, name)
		assert.Equal(t, tc.forGood, errors.Is(err, upstream.ErrNoServiceAccountToken), name)
		assert.Len(t, api.got, tc.asked, name)
		assert.NotContains(t, err.Error(), "eyJ", name)
	}
	api.Close()
	_, err = api.request(t, false, "ok")
	require.ErrorContains(t, err, "requesting its token from the API server")
	assert.NotErrorIs(t, err, upstream.ErrNoServiceAccountToken)

	assert.Contains(t, log.String(), "/serviceaccounts/cart/token", "client-go logs what it asks")
	assert.NotContains(t, log.String(), "eyJ")
}
