//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// limitedAgent starts an agent with the manifest's memory limit.
func (s *scenario) limitedAgent() (*testbed.Agent, *testbed.MemoryLimit) {
	s.t.Helper()
	limit, env, err := testbed.NewManifestMemoryLimit()
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, limit.Close()) })
	a, err := limit.StartAgent(env, world.Kubeconfig)
	require.NoError(s.t, err)
	s.endsWell(a)
	require.NoError(s.t, a.AwaitReady(s.t.Context()))
	return a, limit
}

// Pods that send requests and read no answer cannot bring the agent to its memory limit,
// and others are served meanwhile.
func TestPodsThatNeverReadDoNotKillTheAgent(t *testing.T) {
	const atMost = 100 << 20
	for name, text := range map[string]string{
		"heads of 1,300 fields": testbed.TinyFields(1300),
		"heads of 8 KiB":        testbed.LargeHead(),
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			good := s.pod("good-0", "10.244.0.81", testbed.Ptp, "cart")
			bad := []*pod{s.pod("bad-0", "10.244.0.82", testbed.Ptp, "cart"), s.pod("bad-1", "10.244.0.83", testbed.Ptp, "cart")}
			a, limit := s.limitedAgent()
			require.Equal(t, 200, good.asks(vault).status)

			var floods []*testbed.Flood
			for _, p := range bad {
				f := p.StartFlood(t.Context(), 600, text)
				defer f.Stop()
				floods = append(floods, f)
			}
			for until := time.Now().Add(10 * time.Second); time.Now().Before(until); {
				select {
				case <-a.Done():
					kills, err := limit.OOMKills()
					require.NoError(t, err)
					t.Fatalf("the agent has ended; the kernel killed %d processes for their memory", kills)
				case <-time.After(200 * time.Millisecond):
				}
				assert.Equal(t, 200, good.asks(vault).status)
			}
			peak, err := limit.Peak()
			require.NoError(t, err)
			t.Logf("%d MiB at most; connections opened and closed: %d and %d, %d and %d", peak>>20,
				floods[0].Opened.Load(), floods[0].Closed.Load(), floods[1].Opened.Load(), floods[1].Closed.Load())
			assert.Less(t, peak, int64(atMost))
			kills, err := limit.OOMKills()
			require.NoError(t, err)
			assert.Zero(t, kills)
		})
	}
}

// Whoever may create pods cannot fill the agent's memory with what is theirs, as Kubernetes does not bound
// the number of labels.
func TestPodsWithManyLabelsDoNotKillTheAgent(t *testing.T) {
	s := begin(t)
	good := s.pod("good-0", "10.244.0.81", testbed.Ptp, "cart")
	many := make(map[string]string)
	prefix := strings.Repeat(strings.Repeat("d", 63)+".", 3) + strings.Repeat("d", 61)
	for i := range 3000 { // of 380 bytes; an object may have 1.5 MiB
		many[fmt.Sprintf("%s/%063d", prefix, i)] = strings.Repeat("x", 63)
	}
	create := func(from, to int) {
		for i := from; i < to; i++ {
			s.object("shop", fmt.Sprintf("labelled-%d", i), fmt.Sprintf("10.244.1.%d", i), many)
		}
	}
	create(0, 20)
	_, limit := s.limitedAgent()
	require.Equal(t, 200, good.asks(vault).status)
	create(20, 40)
	assert.Equal(t, 200, good.asks(vault).status)
	peak, err := limit.Peak()
	require.NoError(t, err)
	t.Logf("%d MiB at most", peak>>20)
	assert.Less(t, peak, int64(50<<20), "of pods with 46 MiB of labels")
	kills, err := limit.OOMKills()
	require.NoError(t, err)
	assert.Zero(t, kills)
}
