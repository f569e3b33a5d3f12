//go:build e2e

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// BenchmarkStart is the time from the start of the process, on a node without
// rules, until they are in place.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		a, err := testbed.StartAgent(world.Kubeconfig)
		require.NoError(b, err)
		await(b, a, "iptables rules put in place")
		b.StopTimer()
		require.NoError(b, a.Kill())
		_, _, err = testbed.RunAgent(nil, "cleanup")
		require.NoError(b, err)
		b.StartTimer()
	}
}

// BenchmarkHandover is the time from the start of a successor until it serves.
func BenchmarkHandover(b *testing.B) {
	a, err := testbed.StartAgent(world.Kubeconfig)
	require.NoError(b, err)
	require.NoError(b, a.AwaitReady(b.Context()))
	for b.Loop() {
		next, err := testbed.StartAgent(world.Kubeconfig)
		require.NoError(b, err)
		await(b, next, "listening")
		b.StopTimer()
		_, err = a.Stop()
		require.NoError(b, err)
		a = next
		b.StartTimer()
	}
	_, err = a.Stop()
	require.NoError(b, err)
	_, _, err = testbed.RunAgent(nil, "cleanup")
	require.NoError(b, err)
}

func await(b *testing.B, a *testbed.Agent, what string) {
	b.Helper()
	for range 10_000 {
		if strings.Contains(a.Log(), what) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	b.Fatal(a.Log())
}
