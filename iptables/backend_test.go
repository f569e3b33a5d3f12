package iptables_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestDetectBackend(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.backend = iptables.BackendAuto
			for name, prepare := range map[string]func(){
				"by its rules": func() { n.iptablesOn(backend, "nat", "-A", "POSTROUTING", "-j", "RETURN") },
				"by the kubelet's chain, against more rules in the other": func() {
					for range 3 {
						n.iptablesOn(other(backend), "nat", "-A", "POSTROUTING", "-j", "RETURN")
					}
					n.iptablesOn(backend, "mangle", "-N", "KUBE-KUBELET-CANARY")
				},
			} {
				prepare()
				n.redirect(iptables.Redirect)()
				assert.Contains(t, n.iptablesOn(backend, "nat", "-S"), "aad-metadata", name)
				assert.NotContains(t, n.iptablesOn(other(backend), "nat", "-S"), "aad-metadata", name)
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))
				for _, b := range backends {
					n.iptablesOn(b, "nat", "-F")
				}
			}
			n.iptablesOn(backend, "mangle", "-X")
			n.backend = backend
		})
	}
}

func TestStaleChainInOtherBackend(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.iptablesOn(other(backend), "nat", "-N", "aad-metadata")
			n.iptablesOn(other(backend), "nat", "-A", "aad-metadata", "-p", "tcp", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:2579")
			n.iptablesOn(other(backend), "nat", "-I", "PREROUTING", "1", "-j", "aad-metadata")
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			assert.NotContains(t, n.iptablesOn(other(backend), "nat", "-S"), "aad-metadata")
			assert.Equal(t, "agent", n.ask())
			assert.Zero(t, n.leaks.Load())
		})
	}
}

func other(backend iptables.Backend) iptables.Backend {
	if backend == iptables.NFT {
		return iptables.Legacy
	}
	return iptables.NFT
}
