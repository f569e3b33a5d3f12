package iptables_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testbed/attack"
	"github.com/podidentity/nmi/iptables"
)

// dial connects from a pod, or with nil from the node, to an address of the node.
func dial(pod *testbed.Pod, address string, patience time.Duration) (err error) {
	connect := func() error {
		conn, err := net.DialTimeout("tcp4", address, patience)
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	if pod == nil {
		return connect()
	}
	return pod.Do(connect)
}

// unanswered reports whether a connection attempt got no answer at all.
func unanswered(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestInputDropsDirectConnections(t *testing.T) {
	for _, backend := range backends {
		for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
			t.Run(fmt.Sprintf("%s, mode %s", backend, mode), func(t *testing.T) {
				n := newNode(t, backend, testbed.Ptp)
				n.agent(iptables.Redirect) // on all addresses
				stop := n.redirect(mode)
				direct := []string{testbed.NodeAddress + ":2579", "10.244.0.1:2579"} // the pod's gateway is the node too
				if mode == iptables.DNAT {
					direct = append(direct, "169.254.169.252:2579")
				}
				for _, address := range direct {
					assert.True(t, unanswered(dial(n.pod, address, aMoment)), address)
				}
				assert.Equal(t, "agent", n.ask(), "redirected connections are served")
				for _, address := range []string{"127.0.0.1:2579", testbed.NodeAddress + ":2579"} {
					assert.NoError(t, dial(nil, address, patience), "from the node, over lo, to %s", address)
				}

				n.iptablesOn(backend, "mangle", "-F", "nmi-input")
				n.eventually(func() bool { return unanswered(dial(n.pod, direct[0], aMoment)) }, "repaired")
				n.iptablesOn(backend, "mangle", "-I", "INPUT", "1", "-j", "ACCEPT")
				n.eventually(func() bool { return unanswered(dial(n.pod, direct[0], aMoment)) }, "first again")
				n.iptablesOn(backend, "mangle", "-D", "INPUT", "-j", "ACCEPT")

				stop()
				n.iptablesOn(backend, "mangle", "-F", "nmi-input")
				assert.NoError(t, dial(n.pod, direct[0], patience), "without the rule the kernel accepts")
				n.redirect(mode)()
				require.True(t, unanswered(dial(n.pod, direct[0], aMoment)))
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(mode)))
				assert.NoError(t, dial(n.pod, direct[0], patience))
				assert.NotContains(t, n.iptablesOn(backend, "mangle", "-S"), "nmi-")
			})
		}
	}
}

// Another program's redirect may not use conntrack.
func TestInputInModeNone(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect) // on all addresses
			const address = testbed.NodeAddress + ":2579"
			n.redirect(iptables.DNAT)()
			require.True(t, unanswered(dial(n.pod, address, aMoment)))
			n.redirect(iptables.None) // the previous agent had another mode
			n.eventually(func() bool { return dial(n.pod, address, patience) == nil }, "removed")
			assert.NotContains(t, n.iptablesOn(backend, "mangle", "-S"), "nmi-input")
		})
	}
}

// A successor may have another port. Connections to the predecessor are kept.
func TestInputWithAnotherPort(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect)
			stop := n.redirect(iptables.Redirect)
			before := connect(t, n.pod.DialContext)
			answer, err := before.ask()
			require.NoError(t, err)
			require.Equal(t, "agent", answer)
			stop()

			ln, err := net.Listen("tcp4", "0.0.0.0:2580")
			require.NoError(t, err)
			n.serve(ln, func(string) string { return "next agent" })
			cfg := n.config(iptables.Redirect)
			cfg.Port = 2580
			n.reconcile(cfg)
			assert.Equal(t, "next agent", n.ask())
			answer, err = before.ask()
			require.NoError(t, err)
			assert.Equal(t, "agent", answer, "from before")
			assert.True(t, unanswered(dial(n.pod, testbed.NodeAddress+":2580", aMoment)))
			assert.NoError(t, dial(n.pod, testbed.NodeAddress+":2579", patience), "the old port may be another program's now")
		})
	}
}

// The source ports of the node's connections: few, so that a flood of all is short.
const firstPort, ports = 40000, 500

// late is more than the entries that last packets of the node's earlier connections make.
const late = 20

// Forged replies of the metadata service to connections that the node has not opened yet
// break these connections, if the node drops INVALID packets.
func TestAntispoof(t *testing.T) {
	const ranges = "/proc/sys/net/ipv4/ip_local_port_range"
	before, err := os.ReadFile(ranges)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(ranges, []byte(fmt.Sprint(firstPort, firstPort+ports-1)), 0o644))
	t.Cleanup(func() { assert.NoError(t, os.WriteFile(ranges, before, 0o644)) })
	for _, backend := range backends {
		for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT, iptables.None} {
			t.Run(fmt.Sprintf("%s, mode %s", backend, mode), func(t *testing.T) {
				n := newNode(t, backend, testbed.Ptp)
				n.rpFilter(n.pod.Link, "0")
				n.iptablesOn(backend, "filter", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
				t.Cleanup(func() { n.iptablesOn(backend, "filter", "-F", "INPUT") })
				n.agent(iptables.Redirect) // on all addresses
				stop := n.redirect(mode)
				flood := func() {
					t.Helper()
					require.NoError(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
					for _, to := range []string{testbed.NodeAddress, "169.254.169.252"} {
						_, err := n.pod.Attack(t.Context(), attack.Config{Host: netip.MustParseAddr(to), HostPort: firstPort, Flood: ports})
						require.NoError(t, err)
					}
				}
				for _, setting := range []string{"0", "2"} {
					n.rpFilter(n.network.Uplink.Name, setting)
					flood()
					assert.Less(t, len(forgedEntries(t)), late, "uplink's rp_filter %s", setting)
					for range 5 {
						assert.Equal(t, "imds", n.askFromNode(), "uplink's rp_filter %s", setting)
					}
				}
				if mode != iptables.None {
					assert.Equal(t, "agent", n.ask())
				}
				n.iptablesOn(backend, "raw", "-F")
				n.eventually(func() bool { flood(); return len(forgedEntries(t)) < late }, "repaired")

				stop()
				n.iptablesOn(backend, "raw", "-F")
				flood()
				require.GreaterOrEqual(t, len(forgedEntries(t)), ports, "without the rule")
				assert.Error(t, dial(nil, testbed.MetadataAddress, aMoment), "the flood keeps the node from it")
				require.NoError(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))

				n.redirect(mode)()
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(mode)))
				assert.NotContains(t, n.iptablesOn(backend, "raw", "-S"), "nmi-")
			})
		}
	}
}

// Replies over the uplink that the node's route uses are not forged.
func TestAntispoofWithTwoUplinks(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	second, err := n.network.AddUplink()
	require.NoError(t, err)
	n.redirect(iptables.Redirect)
	for _, uplink := range []*testbed.Uplink{second, n.network.Uplink} {
		require.NoError(t, uplink.Route("169.254.169.254/32"))
		assert.Equal(t, "imds", n.askFromNode(), uplink.Name)
	}
}

// Without a kernel module for hardening the agent is ready.
func TestHardeningWithoutKernelModules(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	bin := t.TempDir()
	writeScript(t, bin+"/iptables-nft", `exec /usr/sbin/iptables-nft "$@"`)
	writeScript(t, bin+"/iptables-nft-restore", `input=$(cat)
case "$input" in *rpfilter*|*ctstate*)
	echo "iptables-nft-restore v1.8.9 (nf_tables): line 4: RULE_APPEND failed (No such file or directory): rule in chain x" >&2
	exit 4
esac
printf '%s\n' "$input" | exec /usr/sbin/iptables-nft-restore "$@"`)
	setPath(t, bin+":/usr/bin:/bin")
	n.agent(iptables.Redirect)
	r, _ := n.reconcile(n.config(iptables.Redirect))
	assert.Equal(t, "agent", n.ask())
	require.Len(t, r.Status().Notes, 1)
	for _, says := range []string{
		"running without rules that are not required: ",
		"(chain nmi-input, first in INPUT of the table mangle) is not in place",
		"(chain nmi-antispoof, in PREROUTING of the table raw) is not in place",
		"the kernel lacks a module",
	} {
		assert.Contains(t, r.Status().Notes[0], says)
	}
	assert.Equal(t, map[string]bool{"routing": true, "guard": true, "redirect": true, "input": false, "antispoof": false}, r.Status().InPlace)
	assert.Equal(t, iptables.NFT, r.Status().Backend)
	failed := r.Stats().Errors
	assert.Positive(t, failed[iptables.CauseKernel])
	failed[iptables.CauseKernel] = 0
	assert.Zero(t, failed)
}
