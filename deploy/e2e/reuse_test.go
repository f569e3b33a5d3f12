//go:build e2e

package e2e

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The network plugin gives an address to the next pod before the API server hears that the
// last one has ended. Until then the API server's word is the last pod's.
func TestAReusedAddressNeverGetsTheLastPodsToken(t *testing.T) {
	for name, before := range map[string]struct {
		asked  bool // the last pod had asked for a token
		outage bool // the API server is away meanwhile
		shape  testbed.Shape
	}{
		"after the last pod has asked": {true, false, testbed.Routed},
		"when it never had":            {false, false, testbed.Ptp},
		"in an outage":                 {true, true, testbed.Routed},
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			last, err := world.AddPod("10.244.0.31", before.shape)
			require.NoError(t, err)
			s.object("shop", "last", "", map[string]string{"aadpodidbinding": "cart"})
			require.NoError(t, world.SetPodStarted(t.Context(), "shop", "last", "10.244.0.31", time.Now().Add(-time.Minute)))
			a := s.agent("--pod-wait=100ms")
			p := &pod{Pod: last, t: t}
			if before.asked {
				require.Equal(t, cart.ClientID, p.asks(vault).subject)
			}
			client := p.Client(patience) // a connection that is kept
			defer client.CloseIdleConnections()
			if before.asked {
				require.Equal(t, cart.ClientID, ask(t, client, tokenURL+vault).subject)
			}
			if before.outage {
				require.NoError(t, world.StopAPIServer())
			}
			require.NoError(t, last.Close())

			next := s.network("10.244.0.31", before.shape)
			for range 20 {
				got := next.asks(vault)
				require.Equal(t, http.StatusServiceUnavailable, got.status, got.body)
				require.Equal(t, "1", got.retryAfter)
				require.Empty(t, got.subject)
			}
			s.says(a, "the address may have been given to another pod")
			if before.outage {
				require.NoError(t, world.StartAPIServer(t.Context()))
			}

			require.NoError(t, world.DeletePod(t.Context(), "shop", "last"))
			s.object("shop", "next", "10.244.0.31", map[string]string{"aadpodidbinding": "report"})
			require.Eventually(t, func() bool {
				got := next.asks(vault)
				require.NotEqual(t, cart.ClientID, got.subject)
				return got.subject == report.ClientID
			}, time.Minute, 10*time.Millisecond)
		})
	}
}

// Neither a container that is restarted nor a route that comes and goes is a reason for a
// doubt.
func TestARestartedContainerGoesOnBeingServed(t *testing.T) {
	s := begin(t)
	s.agent() // before the link: it knows when that appeared
	p := s.pod("steady", "10.244.0.33", testbed.Routed, "cart")
	p.hears(vault, cart.ClientID)
	client := p.Client(patience)
	defer client.CloseIdleConnections()
	link, err := netlink.LinkByName(p.Link)
	require.NoError(t, err)
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: netlink.NewIPNet(p.Addr.AsSlice()), Scope: netlink.SCOPE_LINK}
	for restarts := range 5 {
		require.NoError(t, world.SetPodStarted(t.Context(), "shop", "steady", "10.244.0.33", time.Now().Add(time.Duration(restarts)*time.Second)))
		for range 20 {
			require.NoError(t, netlink.RouteDel(route))
			require.NoError(t, netlink.RouteAdd(route))
			require.Equal(t, cart.ClientID, ask(t, client, tokenURL+vault).subject)
			require.Equal(t, cart.ClientID, p.asks(vault).subject)
		}
	}
}

// A pod that ends keeps its address in the API server for as long as its grace takes.
func TestATerminatingPodWhoseContainersHaveEndedHasNoAddress(t *testing.T) {
	s := begin(t)
	p := s.pod("ending", "10.244.0.32", testbed.Ptp, "cart")
	s.agent("--pod-wait=100ms")
	p.hears(vault, cart.ClientID)
	require.NoError(t, world.EndPod(t.Context(), "shop", "ending"))
	require.Eventually(t, func() bool { return p.asks(vault).status == http.StatusServiceUnavailable }, patience, 10*time.Millisecond)
}
