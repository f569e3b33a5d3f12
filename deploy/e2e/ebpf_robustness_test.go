//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testbed/attack"
)

// asking asks all the time from several pods of their own until stop is called. A failed request
// counts; a token of another identity fails the test.
func (k *kubepods) asking(clients int) (asked, failed *atomic.Int64, stop func()) {
	asked, failed = new(atomic.Int64), new(atomic.Int64)
	done := make(chan struct{})
	var asking sync.WaitGroup
	for i := range clients {
		addr := fmt.Sprintf("10.244.0.%d", 21+i)
		name, want := "cart", cart.ClientID
		if i%2 == 1 {
			name, want = "report", report.ClientID
		}
		c := k.pod(fmt.Sprintf("%s-%d", name, i), addr, k.network(addr, testbed.Routed), binding(name))
		asking.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				got := c.asks()
				if asked.Add(1); got.status != 200 {
					failed.Add(1)
				} else {
					assert.Equal(k.t, want, got.subject)
				}
			}
		})
	}
	return asked, failed, func() { close(done); asking.Wait() }
}

func TestEBPFUpgrades(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	asked, failed, stop := k.asking(4)
	require.Eventually(t, func() bool { return asked.Load() > 20 }, patience, time.Millisecond)
	failed.Store(0)
	for range 20 {
		next := k.starts()
		s.says(next, "listening")
		require.NoError(t, next.AwaitReady(t.Context()))
		s.stops(a)
		a = next
	}
	stop()
	t.Logf("%d requests", asked.Load())
	assert.Zero(t, failed.Load(), "failed requests")
}

// Whenever the agent is killed, no pod gets anything but its own identity.
func TestEBPFKills(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	asked, failed, stop := k.asking(4)
	for range 100 {
		time.Sleep(rand.N(300 * time.Millisecond))
		require.NoError(t, a.Kill())
		a = k.starts()
	}
	require.NoError(t, a.AwaitReady(t.Context()))
	stop()
	assert.Less(t, failed.Load(), asked.Load(), "some are served")
	t.Logf("%d requests, %d of them failed", asked.Load(), failed.Load())
}

// A pod that may send raw packets, past the programs, gets no token of the node either, and not where
// there is no guard chain.
func TestEBPFForgedPackets(t *testing.T) {
	for name, forbidden := range map[string]bool{"with the guard chain": false, "rules are forbidden": true} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			k := s.kubepods()
			if forbidden {
				k.forbidRules()
			}
			k.agent()
			require.Equal(t, !forbidden, strings.Contains(s.command("iptables-save"), "nmi-guard"))
			n := s.network("10.244.0.11", testbed.Ptp)
			attacker := k.pod("attacker-0", "10.244.0.11", n, nil)
			require.Equal(t, 400, attacker.asks().status)
			port := uint16(20000)
			for _, first := range []attack.FirstPacket{attack.None, attack.ACK, attack.SYN} {
				port += 4
				results, err := attacker.Attack(t.Context(), attack.Config{
					Pod: n.Addr, First: first, Ports: []uint16{port, port + 1, port + 2, port + 3}, Patience: 1400 * time.Millisecond,
					Path: strings.TrimPrefix(tokenURL, "http://"+testbed.MetadataAddress) + vault,
				})
				require.NoError(t, err)
				for _, r := range results {
					assert.Contains(t, r.Answer, "Identity not found", first)
				}
			}
			assert.Zero(t, world.IMDS.Requests())
		})
	}
}
