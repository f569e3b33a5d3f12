package links_test

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/iptables/links"
)

func TestStatus(t *testing.T) {
	n := newNode(t)
	bridged, _ := n.addPod("10.244.0.7", testbed.Bridge)
	pinned, _ := n.addPod("10.244.0.8", testbed.Bridge)
	pin(t, pinned)
	ptp, _ := n.addPod("10.244.1.8", testbed.Ptp)
	for _, allowed := range []bool{false, true} {
		pods := &testbed.PodList{}
		var log testlog.Buffer
		tracker := n.track(links.Config{Pods: pods.Addresses, AllowUnguarded: allowed, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		eventually := func(is func(links.Status) bool, what string) links.Status {
			t.Helper()
			require.Eventually(t, func() bool { return is(tracker.Status()) }, patience, tick, what)
			return tracker.Status()
		}
		require.Equal(t, links.Status{}, tracker.Status(), "no pods")

		pods.Set(ptp.Addr, pinned.Addr)
		s := eventually(func(s links.Status) bool { return len(s.Notes) > 0 }, "the pinned address is noted")
		require.NoError(t, s.Unguarded)
		assert.Contains(t, s.Notes[0], "not every attempt is noticed, on: cbr0")
		assert.Empty(t, log.String())

		pods.Set(ptp.Addr, bridged.Addr)
		s = eventually(func(s links.Status) bool { return len(s.Notes) == 0 }, "no pinned pod")
		if allowed {
			require.NoError(t, s.Unguarded)
			assert.Contains(t, log.String(), `tokens="handed out nevertheless"`)
		} else {
			require.ErrorIs(t, s.Unguarded, links.ErrUnguarded)
			require.ErrorContains(t, s.Unguarded, "cbr0: nothing there prevents ARP spoofing (CVE-2021-1677)")
			require.ErrorContains(t, s.Unguarded, "--allow-network-plugin-kubenet")
			assert.Contains(t, log.String(), "links=[cbr0] tokens=withheld")
		}

		pods.Set(ptp.Addr)
		eventually(func(s links.Status) bool { return s.Unguarded == nil }, "no bridged pod")
	}
}
