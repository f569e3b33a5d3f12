package main

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/resolvertest"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// An outage of IMDS is told, and ends no readiness: no other agent could do better.
func TestAnOutageOfIMDSIsANote(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	id := imdstest.Identity{ClientID: "11111111-1111-1111-1111-111111111111"}
	imds := imdstest.NewServer(imdstest.Config{Identities: []imdstest.Identity{id}})
	srv := imds.Start()
	defer srv.Close()
	base, err := url.Parse(srv.URL)
	require.NoError(t, err)
	source := upstream.New(upstream.Config{IMDS: base, Logger: log})
	defer source.Close()
	tokens := tokencache.New(source.Token, tokencache.Config{})
	defer tokens.Close()
	ctx, stop := context.WithCancel(t.Context())
	resolver, err := podresolver.New(resolvertest.NewCluster().Sources(), podresolver.Config{Node: "node1", Logger: log})
	require.NoError(t, err)
	var running sync.WaitGroup
	defer func() { stop(); running.Wait() }()
	running.Go(func() { resolver.Run(ctx) })
	<-resolver.Synced()
	rules, err := iptables.New(iptables.Config{Mode: iptables.None, Logger: log})
	require.NoError(t, err)
	running.Go(func() { rules.Run(ctx) })
	require.Eventually(t, func() bool { return rules.Status().Err == nil }, 30*time.Second, time.Millisecond)
	pages := newHealth(ctx, resolver, rules, source, func() string { return "" }).handler()
	measured, err := metrics(rules, resolver, source, tokens, proxy.New(proxy.Config{Pods: resolver, Tokens: tokens, Upstream: source, Logger: log}))
	require.NoError(t, err)
	get := func(from http.Handler, path string) string {
		w := httptest.NewRecorder()
		from.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		require.Equal(t, http.StatusOK, w.Code, path)
		body, err := io.ReadAll(w.Body)
		require.NoError(t, err)
		return string(body)
	}
	fetch := func(resource string) {
		_, _ = tokens.Get(t.Context(), tokencache.Key{ClientID: id.ClientID, Resource: resource}, netip.Addr{})
	}

	assert.NotContains(t, get(pages, "/readyz"), "IMDS")
	assert.Contains(t, get(measured, "/metrics"), "nmi_imds_unavailable 0")
	imds.Inject(imdstest.Fault{Status: http.StatusServiceUnavailable, RetryAfter: "60"})
	fetch("a")
	assert.Regexp(t, `(?m)^ready\n[^$]*^IMDS has given no tokens since \S+ \(failed fetches: 1\): IMDS answered 503 Service Unavailable$`, get(pages, "/readyz"))
	assert.Contains(t, get(measured, "/metrics"), "nmi_imds_unavailable 1")
	fetch("b")
	assert.NotContains(t, get(pages, "/readyz"), "IMDS")
	assert.Contains(t, get(measured, "/metrics"), "nmi_imds_unavailable 0")
}
