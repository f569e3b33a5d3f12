//go:build e2e

package e2e

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// An outage of IMDS is a note in /readyz and a metric. The agent stays ready: no other
// agent could do better.
func TestAnOutageOfIMDSIsANote(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	readyz := func() string {
		status, text := a.Ready(t.Context())
		require.Equal(t, http.StatusOK, status, text)
		return text
	}

	assert.NotContains(t, readyz(), "IMDS has given no tokens")
	assert.Equal(t, 1, s.metric("nmi_upstream_available"))
	world.IMDS.Inject(imdstest.Fault{Status: http.StatusServiceUnavailable, RetryAfter: "60"})
	assert.Equal(t, http.StatusServiceUnavailable, p.asks(vault).status)
	assert.Regexp(t, `(?m)^IMDS has given no tokens since \S+ \(failed fetches: 1; what to do: docs/troubleshooting\.md#when-imds-gives-no-tokens\): IMDS answered 503 Service Unavailable$`, readyz())
	assert.Zero(t, s.metric("nmi_upstream_available"))
	assert.Equal(t, http.StatusOK, p.asks("https://management.azure.com").status, "the outage is over")
	assert.NotContains(t, readyz(), "IMDS has given no tokens")
	assert.Equal(t, 1, s.metric("nmi_upstream_available"))
}
