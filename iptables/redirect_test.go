package iptables_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestRedirect(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			for _, tc := range []struct {
				shape  testbed.Shape
				mode   iptables.Mode
				answer string
			}{
				{testbed.Ptp, iptables.Redirect, "agent"},
				{testbed.Ptp, iptables.DNAT, "agent"},
				{testbed.Bridge, iptables.Redirect, "agent"},
				{testbed.Bridge, iptables.DNAT, "agent"},
				{testbed.Routed, iptables.DNAT, "agent"},
				// The kernel has no address to redirect to, and drops the packet:
				// no token, but no leak either.
				{testbed.Routed, iptables.Redirect, ""},
			} {
				t.Run(fmt.Sprintf("%s, mode %s", tc.shape, tc.mode), func(t *testing.T) {
					n := newNode(t, backend, tc.shape)
					require.Equal(t, "imds", n.ask(), "without rules the pod reaches the metadata service")
					require.EqualValues(t, 1, n.leaks.Load())
					n.redirect(tc.mode)
					n.agent(tc.mode)
					if tc.answer == "" {
						assert.Empty(t, askFor(n.pod, aMoment))
					} else {
						assert.Equal(t, tc.answer, n.ask())
					}
					assert.EqualValues(t, 1, n.leaks.Load())
				})
			}
		})
	}
}

func TestRulesStayWithoutAgent(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
				t.Run(string(mode), func(t *testing.T) {
					n := newNode(t, backend, testbed.Ptp)
					stopRules := n.redirect(mode)
					stopAgent := n.agent(mode)
					require.Equal(t, "agent", n.ask())
					stopRules()
					stopAgent()
					assert.Empty(t, n.ask())
					assert.True(t, n.inPlace())
					n.agent(mode)
					assert.Equal(t, "agent", n.ask(), "without any change of the rules")
					assert.Zero(t, n.leaks.Load())
				})
			}
		})
	}
}

func TestRedirectRepair(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			for what, change := range map[string]func(){
				"chain flushed":         func() { n.iptables("-F", "aad-metadata") },
				"jump deleted":          func() { n.iptables("-D", "PREROUTING", "-j", "aad-metadata") },
				"nat flushed":           func() { n.iptables("-F") },
				"all of nat deleted":    func() { n.run("*nat\nCOMMIT\n", "iptables-"+string(backend)+"-restore", "--wait=10") },
				"a rule above the jump": func() { n.iptables("-I", "PREROUTING", "1", "-p", "udp", "-j", "ACCEPT") },
				"the jump twice":        func() { n.iptables("-A", "PREROUTING", "-j", "aad-metadata") },
				"a narrower jump":       func() { n.iptables("-A", "PREROUTING", "-i", "veth+", "-j", "aad-metadata") },
				"a rule in the chain":   func() { n.iptables("-I", "aad-metadata", "1", "-j", "RETURN") },
				"another agent's port":  func() { n.iptables("-R", "aad-metadata", "1", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "1") },
			} {
				change()
				n.eventually(func() bool { return n.inPlace() && n.ask() == "agent" }, what)
			}
		})
	}
}

func TestChainOfOldNMI(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Routed)
			n.iptables("-N", "aad-metadata")
			n.iptables("-A", "aad-metadata", "-p", "tcp", "!", "-s", "127.0.0.1/32", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:2579")
			n.iptables("-A", "aad-metadata", "-j", "RETURN")
			n.iptables("-A", "PREROUTING", "-p", "udp", "-j", "ACCEPT")
			n.iptables("-I", "PREROUTING", "1", "-j", "aad-metadata")
			n.redirect(iptables.DNAT)
			n.agent(iptables.DNAT)
			assert.Equal(t, "agent", n.ask())
			assert.True(t, n.inPlace())
			assert.Contains(t, n.iptables("-S", "PREROUTING"), "-p udp", "other programs' rules stay")
		})
	}
}

func TestCleanup(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.iptables("-N", "KUBE-SERVICES")
			n.iptables("-A", "PREROUTING", "-j", "KUBE-SERVICES")
			defer n.iptables("-X")
			defer n.iptables("-F")
			before := n.iptables("-S")
			n.redirect(iptables.DNAT)()
			require.NotEqual(t, before, n.iptables("-S"))
			require.True(t, onLo(t, iptables.DefaultAddress))
			for range 2 {
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.DNAT)))
				assert.Equal(t, before, n.iptables("-S"))
				assert.False(t, onLo(t, iptables.DefaultAddress))
			}
			assert.Equal(t, "imds", n.ask())
		})
	}
}

func TestXtablesLock(t *testing.T) {
	n := newNode(t, iptables.Legacy, testbed.Ptp) // nft has no such lock
	lock, err := os.OpenFile("/run/xtables.lock", os.O_CREATE|os.O_RDONLY, 0o600)
	require.NoError(t, err)
	defer lock.Close()
	r, err := iptables.New(n.config(iptables.Redirect))
	require.NoError(t, err)
	require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	defer running.Wait()
	defer cancel()
	assert.Never(t, func() bool { return r.Status().Err == nil }, 5*time.Second, 50*time.Millisecond)
	require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
	n.eventually(func() bool { return r.Status().Err == nil && n.inPlace() }, "rules in place once the lock is free")
}

func TestCleanupWithForeignReference(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.Redirect)()
			n.iptables("-A", "OUTPUT", "-j", "aad-metadata") // another program's
			err := iptables.Cleanup(t.Context(), n.config(iptables.Redirect))
			require.ErrorContains(t, err, "removing own chains from iptables-"+string(backend))
			assert.Equal(t, "imds", n.ask(), "the jump is gone, and the chain empty")
			n.iptables("-F", "OUTPUT")
			require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))

			// In the other backend it does not affect readiness.
			n.iptablesOn(other(backend), "nat", "-N", "aad-metadata")
			n.iptablesOn(other(backend), "nat", "-A", "OUTPUT", "-j", "aad-metadata")
			n.redirect(iptables.Redirect)
			n.iptablesOn(other(backend), "nat", "-F")
			n.iptablesOn(other(backend), "nat", "-X")
		})
	}
}

// onLo reports whether lo has the address.
func onLo(t *testing.T, addr netip.Addr) bool {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	require.NoError(t, err)
	addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	require.NoError(t, err)
	for _, a := range addrs {
		if a.IP.Equal(addr.AsSlice()) {
			return true
		}
	}
	return false
}

// BenchmarkCheckBesideKubeProxy measures one reconciliation beside 5,000 rules of
// kube-proxy, with nothing to repair.
func BenchmarkCheckBesideKubeProxy(b *testing.B) {
	for _, backend := range backends {
		b.Run(string(backend), func(b *testing.B) {
			n := newNode(b, backend, testbed.Ptp)
			b.Cleanup(n.forgetRules)
			n.kubeProxy()
			r, err := iptables.New(n.config(iptables.Redirect))
			require.NoError(b, err)
			_, err = r.Check(b.Context())
			require.NoError(b, err)
			for b.Loop() {
				if changed, err := r.Check(b.Context()); changed || err != nil {
					b.Fatal(changed, err)
				}
			}
		})
	}
}

// BenchmarkRepairBesideKubeProxy measures the time from a flush to its repair beside 5,000
// rules of kube-proxy, including the commands that flush and look.
func BenchmarkRepairBesideKubeProxy(b *testing.B) {
	for _, backend := range backends {
		b.Run(string(backend), func(b *testing.B) {
			n := newNode(b, backend, testbed.Ptp)
			defer n.iptables("-X")
			defer n.iptables("-F")
			n.kubeProxy()
			n.redirect(iptables.Redirect)
			for b.Loop() {
				n.iptables("-F", "aad-metadata")
				n.eventually(n.inPlace, "repaired")
			}
		})
	}
}
