package iptables_test

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestBlockWireserver(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			require.NoError(t, n.network.Metadata.Do(func() error {
				lo, err := netlink.LinkByName("lo")
				if err != nil {
					return err
				}
				a, err := netlink.ParseAddr("168.63.129.16/32")
				if err != nil {
					return err
				}
				return netlink.AddrAdd(lo, a)
			}))
			for _, port := range []string{"80", "32526", "53"} {
				ln, err := n.network.Metadata.Listen("168.63.129.16:" + port)
				require.NoError(t, err)
				t.Cleanup(func() { _ = ln.Close() })
			}
			dial := func(from func(network, address string, timeout time.Duration) (net.Conn, error), port string) error {
				conn, err := from("tcp4", "168.63.129.16:"+port, patience)
				if err == nil {
					_ = conn.Close()
				}
				return err
			}
			pod := func(network, address string, timeout time.Duration) (conn net.Conn, err error) {
				err = n.pod.Do(func() error {
					conn, err = net.DialTimeout(network, address, timeout)
					return err
				})
				return conn, err
			}
			refused := func() bool {
				return errors.Is(dial(pod, "80"), unix.ECONNREFUSED) && errors.Is(dial(pod, "32526"), unix.ECONNREFUSED)
			}
			require.NoError(t, dial(pod, "80"), "without the option")

			cfg := n.config(iptables.DNAT)
			cfg.BlockWireserver = true
			_, stop := n.reconcile(cfg)
			assert.True(t, refused(), "refused, not dropped")
			assert.NoError(t, dial(pod, "53"), "DNS")
			assert.NoError(t, dial(net.DialTimeout, "80"), "from the node")

			n.iptablesOn(backend, "filter", "-F", "FORWARD")
			n.iptablesOn(backend, "filter", "-A", "FORWARD", "-j", "ACCEPT") // another program's, which would accept it
			n.eventually(refused, "repaired, and first")
			n.iptablesOn(backend, "filter", "-F", "nmi-wireserver")
			n.eventually(refused, "repaired")

			// An agent without the option removes the rule.
			stop()
			stop = n.redirect(iptables.DNAT)
			n.eventually(func() bool { return dial(pod, "80") == nil }, "open again")
			assert.NotContains(t, n.iptablesOn(backend, "filter", "-S"), "nmi-wireserver")
			n.iptablesOn(backend, "filter", "-F", "FORWARD")

			// So does Cleanup.
			stop()
			cfg.Mode = iptables.None // independent of the redirect
			_, stop = n.reconcile(cfg)
			assert.True(t, refused())
			stop()
			require.NoError(t, iptables.Cleanup(t.Context(), cfg))
			assert.NoError(t, dial(pod, "80"))
			assert.NotContains(t, n.iptablesOn(backend, "filter", "-S"), "nmi-wireserver")
		})
	}
}
