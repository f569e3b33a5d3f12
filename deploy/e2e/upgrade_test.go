//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
	"github.com/podidentity/nmi/proxy/upstream"
)

// TestUpgradesKeepTheTokens has 250 tokens in memory and pods that ask for them all the
// time. No upgrade may ask IMDS for one of them, whether IMDS would answer or not.
func TestUpgradesKeepTheTokens(t *testing.T) {
	const pods, each = 10, 25
	s := begin(t)
	a := s.agent()
	var warming sync.WaitGroup
	var loads []*load
	resource := func(pod, n int) string { return fmt.Sprintf("https://warm-%d-%d.example", pod, n) }
	all := make([]*pod, pods)
	for i := range all {
		all[i] = s.pod(fmt.Sprintf("cart-%d", i), fmt.Sprintf("10.244.0.%d", 100+i), testbed.Ptp, "cart")
		warming.Go(func() {
			for n := range each {
				got := all[i].asks(resource(i, n))
				assert.Equal(t, http.StatusOK, got.status, got.body)
			}
		})
	}
	warming.Wait()
	require.Equal(t, pods*each, s.metric("nmi_cache_tokens"))
	for i, p := range all {
		var next atomic.Int64
		loads = append(loads, startLoadOf(p, 1, 1, func() string { return tokenURL + resource(i, int(next.Add(1))%each) }))
	}

	world.IMDS.Reset()
	for range 5 {
		next := s.successor()
		s.stops(a)
		a = next
	}
	s.stops(s.successor()) // and back
	assert.Zero(t, world.IMDS.Requests(), "of IMDS during 6 upgrades")
	assert.Equal(t, pods*each, s.metric("nmi_cache_tokens"))

	throttled := make([]imdstest.Fault, 1000)
	for i := range throttled {
		throttled[i] = imdstest.Fault{Status: http.StatusTooManyRequests, RetryAfter: "60"}
	}
	world.IMDS.Inject(throttled...)
	assert.NotEqual(t, http.StatusOK, all[0].asks("https://cold-0.example").status)
	asked := world.IMDS.Requests()
	assert.Positive(t, asked)
	for i := range 5 {
		next := s.successor()
		s.stops(a)
		a = next
		assert.NotEqual(t, http.StatusOK, all[0].asks(fmt.Sprintf("https://cold-%d.example", i+1)).status)
	}
	assert.Equal(t, asked, world.IMDS.Requests(), "IMDS is asked nothing while it wants no requests, whichever agent runs")
	assert.Equal(t, pods*each, s.metric("nmi_cache_tokens"))
	var sent int64
	for _, l := range loads {
		l.losesNothing(t)
		sent += l.sent.Load()
	}
	t.Logf("%d requests over 11 upgrades", sent)
	assert.NotContains(t, a.Log(), "not all tokens")
	var body struct {
		Token string `json:"access_token"`
	}
	require.NoError(t, json.Unmarshal([]byte(all[0].asks(resource(0, 0)).body), &body))
	assert.Greater(t, len(body.Token), 1000)
	assert.NotContains(t, a.Log(), body.Token[len(body.Token)-100:])
}

// TestUpgradeKeepsIMDSLimits has the old agent in the middle of as many requests to IMDS as there
// may be at once when the new one comes, which is asked for as many more at once.
func TestUpgradeKeepsIMDSLimits(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	require.Equal(t, http.StatusOK, p.asks(vault).status)
	world.IMDS.SetLatency(4 * time.Second)
	t.Cleanup(func() { world.IMDS.SetLatency(imdsLatency) })
	atOnce := func() int { atOnce, _ := world.IMDS.Peak(); return atOnce }
	var asking sync.WaitGroup
	ask := func(agent string) {
		for i := range upstream.DefaultAtOnce {
			asking.Go(func() {
				got := p.asks(fmt.Sprintf("https://%s-%d.example", agent, i))
				assert.Equal(t, http.StatusOK, got.status, got.body)
			})
		}
	}
	world.IMDS.Reset()
	ask("old")
	require.Eventually(t, func() bool { return atOnce() == upstream.DefaultAtOnce }, patience, time.Millisecond)
	next := s.successor()
	ask("new")
	_, text := next.Ready(t.Context())
	const beside = "the agent that this one took over from still runs"
	assert.Contains(t, text, beside)
	assert.Equal(t, 1, s.metric("nmi_upstream_limits_shared"))
	asking.Wait()
	assert.Equal(t, upstream.DefaultAtOnce, atOnce())
	s.stops(a)
	require.Eventually(t, func() bool { return s.metric("nmi_upstream_limits_shared") == 0 }, patience, 10*time.Millisecond)
	_, text = next.Ready(t.Context())
	assert.NotContains(t, text, beside)
}

// otherBinary names the variable with the path of an older agent's binary.
const otherBinary = "NMI_OTHER_BINARY"

// TestUpgradeFromAnotherBinaryAndBack is for an agent of another version. Its protocol is
// also in cmd/nmi/handover's tests, to the byte.
func TestUpgradeFromAnotherBinaryAndBack(t *testing.T) {
	path := os.Getenv(otherBinary)
	if path == "" {
		t.Skipf("$%s names no binary of another version", otherBinary)
	}
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	q := s.pod("report-0", "10.244.0.12", testbed.Routed, "report")
	other := func() *testbed.Agent {
		t.Helper()
		a, err := testbed.StartAgentBinary(path, world.Kubeconfig)
		require.NoError(t, err)
		s.endsWell(a)
		s.says(a, "listening")
		require.NoError(t, a.AwaitReady(t.Context()))
		return a
	}
	a := other()
	require.Equal(t, 200, p.asks(vault).status)
	loads := []*load{startLoad(p, 4, 2), startLoad(q, 4, 2)}
	for range 10 {
		next := s.successor()
		s.stops(a)
		s.stops(other()) // gives back
		a = other()
		s.stops(next)
		s.stops(s.successor())
	}
	for _, l := range loads {
		l.losesNothing(t)
	}
}
