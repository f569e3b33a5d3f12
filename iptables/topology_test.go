package iptables_test

import (
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

// bridged is the sysctl that shows packets on a bridge to iptables. It exists with the
// module br_netfilter, which kube-proxy requires.
const bridged = "/proc/sys/net/bridge/bridge-nf-call-iptables"

func TestBridge(t *testing.T) {
	was, err := os.ReadFile(bridged)
	settings := []string{"0", "1"}
	if err != nil {
		settings = []string{"no br_netfilter"}
	} else {
		t.Cleanup(func() { assert.NoError(t, os.WriteFile(bridged, was, 0o644)) })
	}
	for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
		for _, setting := range settings {
			t.Run(string(mode)+", bridge-nf-call-iptables "+setting, func(t *testing.T) {
				if err == nil {
					require.NoError(t, os.WriteFile(bridged, []byte(setting), 0o644))
				}
				n := newNode(t, iptables.NFT, testbed.Bridge)
				second, _ := n.addPod("10.244.0.8", testbed.Bridge)
				n.redirect(mode)
				n.agent(mode)
				assert.Equal(t, "agent", n.ask())
				assert.Equal(t, "agent", ask(second))
				assert.Zero(t, n.leaks.Load())

				ln, err := second.Listen("10.244.0.8:8080")
				require.NoError(t, err)
				defer ln.Close()
				conn, err := n.pod.DialContext(t.Context(), "tcp", "10.244.0.8:8080")
				require.NoError(t, err)
				defer conn.Close()
				assert.Contains(t, neighbours(t, n.pod), "10.244.0.8", "on the same link")
			})
		}
	}
}

// neighbours lists a pod's neighbour entries.
func neighbours(t *testing.T, pod *testbed.Pod) (addrs []string) {
	t.Helper()
	require.NoError(t, pod.Do(func() error {
		known, err := netlink.NeighList(0, netlink.FAMILY_V4)
		for _, n := range known {
			addrs = append(addrs, n.IP.String())
		}
		return err
	}))
	return addrs
}

func TestTwoUplinks(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			second, err := n.network.AddUplink()
			require.NoError(t, err)
			uplinks := []*testbed.Uplink{second, n.network.Uplink}
			for _, uplink := range uplinks {
				require.NoError(t, uplink.Route("0.0.0.0/0"))
				sent := packetsSent(t, uplink)
				require.Equal(t, "imds", n.ask(), uplink.Name)
				n.eventually(func() bool { return packetsSent(t, uplink) > sent+3 }, "it went over "+uplink.Name)
			}
			n.leaks.Store(0)
			for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
				stopRules := n.redirect(mode)
				stopAgent := n.agent(mode)
				stopAsking := n.askAllTheTime()
				for _, destination := range []string{"0.0.0.0/0", "169.254.169.254/32"} {
					for _, uplink := range uplinks {
						require.NoError(t, uplink.Route(destination))
						assert.Equal(t, "agent", n.ask(), "%s, route to %s over %s", mode, destination, uplink.Name)
					}
				}
				stopAsking()
				stopAgent()
				stopRules()
			}
			assert.Zero(t, n.leaks.Load())
		})
	}
}

func packetsSent(t *testing.T, uplink *testbed.Uplink) uint64 {
	t.Helper()
	l, err := netlink.LinkByName(uplink.Name)
	require.NoError(t, err)
	return l.Attrs().Statistics.TxPackets
}
