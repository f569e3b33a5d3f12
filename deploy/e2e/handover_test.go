//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// successor starts an agent beside the one that runs, and waits until it has
// taken over.
func (s *scenario) successor(flags ...string) *testbed.Agent {
	s.t.Helper()
	a := s.agentNotReady(flags...)
	s.says(a, "listening")
	require.NoError(s.t, a.AwaitReady(s.t.Context()))
	return a
}

func (s *scenario) says(a *testbed.Agent, what string) {
	s.t.Helper()
	s.saysTimes(a, what, 1)
}

// saysTimes waits until the agent has logged something so often.
func (s *scenario) saysTimes(a *testbed.Agent, what string, times int) {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return strings.Count(a.Log(), what) >= times }, patience, 2*time.Millisecond, what)
}

// stops ends an agent as the kubelet does.
func (s *scenario) stops(a *testbed.Agent) {
	s.t.Helper()
	code, err := a.Stop()
	require.NoError(s.t, err)
	assert.Zero(s.t, code)
}

// probes is what the kubelet is told by the agent's own pod.
func (s *scenario) probes(a *testbed.Agent, what string) (code int, output string) {
	s.t.Helper()
	return s.nmi("probe", what, "--probe-socket="+a.ProbeSocket)
}

func TestUpgradesUnderLoad(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	q := s.pod("report-0", "10.244.0.12", testbed.Routed, "report")
	a := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	loads := []*load{startLoad(p, 4, 2), startLoad(q, 4, 2)}
	for range 20 {
		next := s.successor()
		s.stops(a)
		a = next
	}
	for _, l := range loads {
		l.losesNothing(t)
		assert.Greater(t, l.sent.Load(), int64(1000))
	}
}

func TestRollbackUnderLoad(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	old := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	l := startLoad(p, 4, 4)
	for i := range 10 {
		next := s.successor()
		s.stops(next)
		status, text := old.Ready(t.Context())
		assert.Equal(t, http.StatusOK, status, text)
		s.saysTimes(old, "this one keeps serving", i+1)
	}
	l.losesNothing(t)
	assert.Equal(t, 10, strings.Count(old.Log(), "level=WARN"), "one line each")
}

func TestUpgradeWhileRequestsWait(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	world.IMDS.SetLatency(700 * time.Millisecond)
	t.Cleanup(func() { world.IMDS.SetLatency(imdsLatency) })
	var n atomic.Int64
	l := startLoadOf(p, 8, 8, func() string { return fmt.Sprintf("%shttps://slow-%d.example", tokenURL, n.Add(1)) })
	for range 3 {
		next := s.successor()
		s.stops(a)
		a = next
	}
	s.stops(s.successor())
	l.losesNothing(t)

	// With nobody to take over, what was begun is finished.
	world.IMDS.SetLatency(3 * time.Second)
	const last = 10 // five at a time
	before := s.metric("nmi_cache_misses_total")
	var asking sync.WaitGroup
	for range last {
		asking.Go(func() {
			got := p.asks(fmt.Sprintf("https://last-%d.example", n.Add(1)))
			assert.Equal(t, 200, got.status, got.body)
		})
	}
	require.Eventually(t, func() bool { return s.metric("nmi_cache_misses_total") == before+last }, patience, 10*time.Millisecond, "all wait")
	require.NoError(t, a.Signal(syscall.SIGTERM))
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == 503 && strings.Contains(text, "the agent is stopping")
	}, patience, 10*time.Millisecond)
	client := &http.Client{Timeout: patience}
	resp, err := client.Get("http://127.0.0.1:8085/readyz")
	require.NoError(t, err, "it says how it is until it ends, also after it has taken everything back")
	defer resp.Body.Close()
	assert.Equal(t, 503, resp.StatusCode)
	s.stops(a)
	asking.Wait()
}

// metric is the value of a metric without labels.
func (s *scenario) metric(name string) (value int) {
	s.t.Helper()
	resp, err := http.Get("http://127.0.0.1:9090/metrics")
	require.NoError(s.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(s.t, err)
	_, rest, found := strings.Cut(string(body), "\n"+name+" ")
	require.True(s.t, found, name)
	_, err = fmt.Sscan(rest, &value)
	require.NoError(s.t, err)
	return value
}

func TestUpgradeAppliesNewFlags(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	first := s.agent()
	instance := "http://" + testbed.MetadataAddress + "/metadata/instance?api-version=2021-02-01"
	ask := func() int { return p.get(instance, patience).status }
	for range 3 {
		require.Equal(t, 200, ask())
		hardened := s.successor("--block-instance-metadata")
		s.says(hardened, "took over from the agent that ran before; this one serves now")
		for range 100 {
			require.Equal(t, 403, ask(), "the old agent still answers")
		}
		s.stops(hardened)
	}
	assert.Equal(t, 200, ask(), "back to what it was")
	assert.NotContains(t, first.Log(), "took over")
}

func TestUpgradeChangesPorts(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	l := startLoad(p, 2, 2)
	for range 2 {
		b := s.successor("--nmi-port=2580", "--http-probe-port=8086", "--prometheus-port=9091")
		s.stops(a)
		assert.Contains(t, s.nat(), "2580")
		a = s.successor()
		s.stops(b)
		assert.Contains(t, s.nat(), "2579")
	}
	l.losesNothing(t)
}
