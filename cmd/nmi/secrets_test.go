package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/proxy/upstream"
)

func TestReadingASecret(t *testing.T) {
	answers := map[string]struct {
		status int
		body   string
	}{
		"/api/v1/namespaces/shop/secrets/sp":        {200, `{"kind":"Secret","apiVersion":"v1","metadata":{"name":"sp"},"data":{"clientsecret":"czNjcjN0"},"type":"Opaque"}`},
		"/api/v1/namespaces/shop/secrets/gone":      {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"secrets \"gone\" not found","reason":"NotFound","code":404}`},
		"/api/v1/namespaces/shop/secrets/forbidden": {403, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"User \"nmi\" cannot get","reason":"Forbidden","code":403}`},
		"/api/v1/namespaces/shop/secrets/broken":    {500, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"etcd is away","reason":"InternalError","code":500}`},
		"/api/v1/namespaces/shop/secrets/half":      {200, `{"kind":"Secret","data":{"clientsecret":"czNjcjN0`},
		"/api/v1/namespaces/shop/secrets/other":     {200, `{"kind":"ConfigMap","data":{"clientsecret":"czNjcjN0"}}`},
		"/api/v1/namespaces/shop/secrets/odd":       {200, `{"kind":"Secret","data":{"clientsecret":"s3cr3t!"}}`},
	}
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, ok := answers[r.URL.Path]
		assert.True(t, ok && r.Method == http.MethodGet, "%s %s", r.Method, r.URL)
		assert.Empty(t, r.URL.RawQuery, "no watch")
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(a.status)
		_, _ = io.WriteString(w, a.body)
	}))
	defer api.Close()

	// With all that client-go has to say, more than the agent ever logs.
	o := mustParse(t, "--node=n", "--v=10")
	var log bytes.Buffer
	klog.SetSlogLogger(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.Level(-20)})))
	defer func() {
		klog.ClearLogger()
		assert.NoError(t, o.klog.Set("v", "0"))
	}()

	s, err := newSecrets(&rest.Config{Host: api.URL})
	require.NoError(t, err)
	data, err := s.read(t.Context(), "shop", "sp")
	require.NoError(t, err)
	assert.Equal(t, map[string][]byte{"clientsecret": []byte("s3cr3t")}, data)
	for name, tc := range map[string]struct {
		text    string
		forGood bool
	}{
		"gone":      {"it cannot be read: there is no such secret", true},
		"forbidden": {"apply deploy/service-principals/rbac.yaml to namespace shop, with the secret's name in it (User \"nmi\" cannot get)", true},
		"../sp":     {`"../sp" cannot be part of a secret's name`, true},
		"":          {`"" cannot be part`, true},
		"broken":    {"asking the API server for it: etcd is away", false},
		"half":      {"not the JSON of a secret", false},
		"other":     {"not the JSON of a secret", false},
		"odd":       {"not the JSON of a secret", false},
	} {
		_, err := s.read(t.Context(), "shop", name)
		require.ErrorContains(t, err, tc.text, name)
		assert.Equal(t, tc.forGood, errors.Is(err, upstream.ErrNoSecret), name)
		assert.NotContains(t, err.Error(), "s3cr3t")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.read(ctx, "shop", "sp")
	require.ErrorIs(t, err, context.Canceled)

	assert.Contains(t, log.String(), "/api/v1/namespaces/shop/secrets/sp", "client-go logs what it asks")
	for _, secret := range []string{"s3cr3t", "czNjcjN0"} {
		assert.NotContains(t, log.String(), secret)
	}
}
