package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control.sock")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	// 127.0.0.2 is the address of a pod.
	o := options{pods: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, control: socket, imds: freeAddress(t), entra: freeAddress(t)}
	go func() { ended <- run(ctx, o) }()
	c := control.NewClient(socket)
	require.Eventually(t, func() bool { return c.Reset(t.Context()) == nil }, 30*time.Second, 10*time.Millisecond)

	require.NoError(t, c.Configure(t.Context(), control.Config{
		IMDS:  imdstest.Config{Identities: []imdstest.Identity{{ClientID: "cart"}}, Latency: time.Millisecond},
		Entra: entratest.Config{Principals: []entratest.Principal{{ClientID: "principal", Tenants: []string{"tenant"}}}},
	}))
	token := "http://" + o.imds + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r&client_id=cart"
	require.NoError(t, c.Inject(t.Context(), imdstest.Fault{Status: http.StatusTooManyRequests, RetryAfter: "7"}))
	assert.Equal(t, http.StatusTooManyRequests, status(t, "127.0.0.1", token))
	assert.Equal(t, http.StatusOK, status(t, "127.0.0.1", token))
	assert.Equal(t, http.StatusOK, status(t, "127.0.0.2", token))

	counts, err := c.Counts(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 3, counts.Requests)
	assert.Equal(t, map[string]int{"cart": 2}, counts.Tokens)
	assert.Equal(t, 1, counts.Leaks)
	require.Len(t, counts.Leaked, 1)
	assert.Equal(t, netip.MustParseAddr("127.0.0.2"), counts.Leaked[0].From)
	assert.Equal(t, "cart", counts.Leaked[0].Subject)
	require.Len(t, counts.Calls, 3)
	assert.WithinDuration(t, time.Now(), counts.Calls[0].Time, time.Minute)

	entra, err := c.Entra(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "https://"+o.entra, entra.Authority)
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM([]byte(entra.Certificate)))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	resp, err := client.Get(entra.Authority + "/tenant/v2.0/.well-known/openid-configuration")
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, http.StatusOK, resp.StatusCode)

	stop()
	require.NoError(t, <-ended)
	assert.NoFileExists(t, socket)
}

// freeAddress returns an address of the loopback on which nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

// status asks for url from one address of the loopback; 0 is no answer.
func status(t *testing.T, from, url string) int {
	t.Helper()
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	require.NoError(t, err)
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}
