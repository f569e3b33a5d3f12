//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// keeps opens so many connections, and says how many of them stay open.
func (p *pod) keeps(connections int) int {
	p.t.Helper()
	var open atomic.Int32
	var all sync.WaitGroup
	conns := make([]net.Conn, connections)
	for i := range conns {
		var err error
		conns[i], err = p.DialContext(p.t.Context(), "tcp", testbed.MetadataAddress)
		require.NoError(p.t, err)
		defer conns[i].Close()
	}
	for _, conn := range conns {
		all.Go(func() {
			assert.NoError(p.t, conn.SetReadDeadline(time.Now().Add(time.Second)))
			if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				open.Add(1)
			}
		})
	}
	all.Wait()
	return int(open.Load())
}

// What pods may do is what the flags say.
func TestLimitsAreThoseOfTheFlags(t *testing.T) {
	const attested = "http://" + testbed.MetadataAddress + "/metadata/attested/document?api-version=2021-02-01"
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.61", testbed.Ptp, "cart")
	limits := func(agent string) (atOnce, perSecond, connections, path, host int) {
		world.IMDS.Reset()
		var asking sync.WaitGroup
		for i := range 8 {
			asking.Go(func() { assert.Equal(t, 200, p.asks(fmt.Sprintf("https://%s-%d.example", agent, i)).status) })
		}
		asking.Wait()
		atOnce, perSecond = world.IMDS.Peak()
		connections = p.keeps(12)
		host, _ = asHost(t, "cart-0")
		return atOnce, perSecond, connections, p.get(attested, 5*time.Second).status, host
	}

	usual := s.agent()
	atOnce, perSecond, connections, path, host := limits("usual")
	assert.LessOrEqual(t, atOnce, 5)
	assert.Equal(t, 8, perSecond)
	assert.Equal(t, 12, connections)
	assert.Equal(t, http.StatusNotFound, path)
	assert.Equal(t, http.StatusOK, host)

	s.successor("--imds-token-rate=4", "--imds-token-concurrency=1", "--max-connections-per-pod=10",
		"--allow-path=/metadata/attested/document", "--host-token-uids=")
	s.stops(usual)
	atOnce, perSecond, connections, path, host = limits("limited")
	assert.Equal(t, 1, atOnce)
	assert.LessOrEqual(t, perSecond, 4)
	assert.Equal(t, 10, connections)
	assert.Equal(t, http.StatusOK, path)
	assert.Equal(t, http.StatusNotFound, host)
}
