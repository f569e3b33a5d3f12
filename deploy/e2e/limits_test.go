//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// keeps opens connections, and reports whether as many of them as wanted stay open.
func (p *pod) keeps(want, opened int) bool {
	p.t.Helper()
	ended := make(chan error, opened)
	for range opened {
		conn, err := p.DialContext(p.t.Context(), "tcp", testbed.MetadataAddress)
		require.NoError(p.t, err)
		defer conn.Close()
		go func() { _, err := conn.Read(make([]byte, 1)); ended <- err }()
	}
	for range opened - want {
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			return false
		}
	}
	select {
	case <-ended:
		return false
	case <-time.After(500 * time.Millisecond):
		return true
	}
}

// What pods may do is what the flags say.
func TestLimitsAreThoseOfTheFlags(t *testing.T) {
	const attested = "http://" + testbed.MetadataAddress + "/metadata/attested/document?api-version=2021-02-01"
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.61", testbed.Ptp, "cart")
	limits := func(agent string, tokens int) (atOnce, perSecond, path, host int) {
		world.IMDS.Reset()
		var asking sync.WaitGroup
		for i := range tokens {
			asking.Go(func() { assert.Equal(t, 200, p.asks(fmt.Sprintf("https://%s-%d.example", agent, i)).status) })
		}
		asking.Wait()
		atOnce, perSecond = world.IMDS.Peak()
		host, _ = asHost(t, "cart-0")
		return atOnce, perSecond, p.get(attested, 5*time.Second).status, host
	}

	usual := s.agent()
	atOnce, perSecond, path, host := limits("usual", 16)
	assert.LessOrEqual(t, atOnce, 4)
	assert.Greater(t, perSecond, 4)
	assert.Equal(t, http.StatusNotFound, path)
	assert.Equal(t, http.StatusOK, host)

	s.successor("--imds-token-rate=4", "--imds-token-concurrency=1", "--allow-path=/metadata/attested/document", "--host-token-uids=")
	s.stops(usual)
	atOnce, perSecond, path, host = limits("limited", 8)
	assert.Equal(t, 1, atOnce)
	assert.LessOrEqual(t, perSecond, 4)
	assert.True(t, p.keeps(64, 66))
	assert.Equal(t, http.StatusOK, path)
	assert.Equal(t, http.StatusNotFound, host)
}
