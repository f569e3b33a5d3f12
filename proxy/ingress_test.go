package proxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver"
)

// Over another link than loopback this is for the tests of iptables/links and the e2e.
func TestCheckSourceGetsIngressInterface(t *testing.T) {
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	var ingress, checks atomic.Int64
	w := newWorld(t, func(cfg *Config) {
		cfg.CheckSource = func(addr netip.Addr, index int, pod *podresolver.Pod) error {
			assert.Equal(t, bound, addr.String())
			assert.Equal(t, "shop/bound", pod.String())
			ingress.Store(int64(index))
			checks.Add(1)
			return nil
		}
	})
	c := w.connect(bound)
	for range 3 {
		assert.Equal(t, 200, c.ask(t))
	}
	assert.Equal(t, int64(lo.Index), ingress.Load())
	assert.Equal(t, int64(3), checks.Load(), "each request, cached token or not")
}

func TestUnconfirmedCaller(t *testing.T) {
	var doubts atomic.Int64 // checks that are to fail
	w := newWorld(t, func(cfg *Config) {
		cfg.CheckSource = func(netip.Addr, int, *podresolver.Pod) error {
			if doubts.Add(-1) >= 0 {
				return fmt.Errorf("%w: veth7 appeared later", podresolver.ErrUnconfirmed)
			}
			return nil
		}
	})
	for _, from := range []string{bound, excepted} {
		doubts.Store(1000)
		resp, body := w.get(from, tokenURL)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.Equal(t, "1", resp.Header.Get("Retry-After"))
		assert.JSONEq(t, `{"error":"temporarily_unavailable","error_description":"The pod of this address is not known yet"}`, body)
		assert.Less(t, doubts.Load(), int64(1000))
	}
	assert.Contains(t, w.log.String(), "pod shop/bound: the caller may not be the pod that the API server reports for this address: veth7 appeared later")
	assert.Zero(t, w.imds.Requests())
	doubts.Store(0)
	resp, _ := w.get(bound, tokenURL)
	assert.Equal(t, 200, resp.StatusCode)
}

func TestCheckSourceAllocations(t *testing.T) {
	s, r, w := cached(t)
	s.cfg.CheckSource = func(netip.Addr, int, *podresolver.Pod) error { return nil }
	assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() { ask(s, w, r) }), cachedAllocs)
}
