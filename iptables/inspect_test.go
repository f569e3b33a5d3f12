package iptables_test

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

// inspect returns the parts that are not in place.
func (n *node) inspect(cfg iptables.Config) map[string]string {
	n.t.Helper()
	i, err := iptables.Inspect(cfg)
	require.NoError(n.t, err)
	missing := make(map[string]string)
	for _, part := range i.Parts() {
		if part.Err != nil {
			missing[part.Name] = part.Err.Error()
		}
	}
	return missing
}

func TestInspectParts(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			cfg := n.config(iptables.DNAT)
			cfg.BlockWireserver = true
			for _, part := range []string{"routing", "guard", "redirect", "wireserver", "input", "antispoof"} {
				assert.NotEmpty(t, n.inspect(cfg)[part], "before there is an agent: %s", part)
			}
			_, stop := n.reconcile(cfg)
			assert.Empty(t, n.inspect(cfg))
			auto := cfg
			auto.Mode = iptables.ModeAuto
			assert.Empty(t, n.inspect(auto), "either mode")
			stop()

			for _, tc := range []struct{ part, table, change, says string }{
				{"guard", "mangle", "-I FORWARD -j ACCEPT", `is not first in FORWARD of the table mangle: "-A FORWARD -j ACCEPT" precedes it`},
				{"guard", "mangle", "-D FORWARD -j nmi-guard", "nothing jumps to chain nmi-guard"},
				{"guard", "mangle", "-A nmi-guard -j RETURN", "chain nmi-guard of the table mangle has other rules"},
				{"redirect", "nat", "-A PREROUTING -j aad-metadata", "chain aad-metadata has several jumps"},
				{"redirect", "nat", "-F aad-metadata", "chain aad-metadata of the table nat has other rules: []"},
				{"antispoof", "raw", "-D PREROUTING -j nmi-antispoof", "nothing jumps to chain nmi-antispoof"},
				{"input", "mangle", "-F nmi-input", "other rules"},
				{"wireserver", "filter", "-F nmi-wireserver", "other rules"},
			} {
				n.iptablesOn(backend, tc.table, strings.Fields(tc.change)...)
				assert.Contains(t, n.inspect(cfg)[tc.part], tc.says, tc.change)
				assert.Len(t, n.inspect(cfg), 1, "the others are in place")
				_, stop := n.reconcile(cfg)
				stop()
				n.iptablesOn(backend, "mangle", "-S")
				require.Empty(t, n.inspect(cfg))
			}
			ip := func(args ...string) {
				out, err := exec.Command("ip", args...).CombinedOutput()
				require.NoError(t, err, string(out))
			}
			ip("rule", "del", "pref", "11")
			assert.Contains(t, n.inspect(cfg)["routing"], "missing policy routing rules: 11: to 169.254.169.254/32 prohibit")
			ip("addr", "del", iptables.DefaultAddress.String()+"/32", "dev", "lo")
			assert.Contains(t, n.inspect(cfg)["redirect"], "lo does not have the address 169.254.169.252")
		})
	}
}

func TestTryWritingLeavesNothing(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.DNAT)
			before := n.iptablesOn(backend, "mangle", "-S")
			i, err := iptables.Inspect(n.config(iptables.DNAT))
			require.NoError(t, err)
			require.NoError(t, i.TryWriting(t.Context()))
			assert.Equal(t, before, n.iptablesOn(backend, "mangle", "-S"))
			assert.NoError(t, iptables.Privileges())
		})
	}
}

func TestRestrictions(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.DNAT)
			i, err := iptables.Inspect(n.config(iptables.DNAT))
			require.NoError(t, err)
			found, err := i.Restrictions()
			require.NoError(t, err)
			assert.Empty(t, found, "the agent's own guard is not listed")
			rule := "FORWARD -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment restriction -j DROP"
			for _, table := range []string{"filter", "mangle"} {
				n.iptablesOn(backend, table, strings.Fields("-I "+rule)...)
				found, err = i.Restrictions()
				require.NoError(t, err)
				assert.Equal(t, []string{fmt.Sprintf("iptables-%s -t %s -A %s", backend, table, rule)}, found)
				n.iptablesOn(backend, table, strings.Fields("-D "+rule)...)
			}
		})
	}
}

func TestEarlier(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			t.Cleanup(n.forgetRules) // after the agent has ended
			n.redirect(iptables.DNAT)
			i, err := iptables.Inspect(n.config(iptables.DNAT))
			require.NoError(t, err)
			earlier := func() []string {
				found, err := i.Earlier()
				require.NoError(t, err)
				return found
			}
			n.kubeProxyNFT()
			n.kubeProxy()
			n.calico()
			require.Empty(t, earlier(), "rules that do not name the address, and the agent's own")

			other := backends[1-slices.Index(backends, backend)]
			for _, tc := range []struct {
				backend              iptables.Backend
				table, rule, reports string
			}{
				{backend, "raw", "PREROUTING -d 169.254.169.254/32 -j DROP", "iptables-" + string(backend) + " -t raw -A PREROUTING -d 169.254.169.254/32 -j DROP"},
				{other, "mangle", "PREROUTING -d 169.254.169.254/32 -j DROP", "iptables-" + string(other) + " -t mangle -A PREROUTING"},
				{other, "nat", "PREROUTING -d 169.254.169.254/32 -p tcp -j REDIRECT --to-ports 81", "iptables-" + string(other) + " -t nat -A PREROUTING"},
			} {
				n.iptablesOn(tc.backend, tc.table, strings.Fields("-A "+tc.rule)...)
				if found := earlier(); assert.Len(t, found, 1, tc.rule) {
					assert.Contains(t, found[0], tc.reports)
				}
				n.iptablesOn(tc.backend, tc.table, strings.Fields("-D "+tc.rule)...)
			}
			for hook, match := range map[string]string{
				"ip other: nat hook prerouting priority -110":      "ip daddr 169.254.169.254 tcp dport 80 dnat to 169.254.169.254:80",
				"ip other: nat hook prerouting priority -100":      "ip daddr 169.254.0.0/16 tcp dport 80 dnat to 169.254.169.254:80",
				"inet other: filter hook prerouting priority -300": "ip daddr { 10.0.0.1, 169.254.169.254 } drop",
				"inet other: filter hook prerouting priority -150": "ip daddr . tcp dport { 169.254.169.254 . 80 } drop",
			} {
				family, kind, _ := strings.Cut(hook, ": ")
				n.run(fmt.Sprintf("table %s {\nchain first {\ntype %s;\njump then\n}\nchain then {\n%s\n}\n}\n", family, kind, match), "nft", "-f", "-")
				if found := earlier(); assert.Len(t, found, 1, hook) {
					assert.Contains(t, found[0], "nftables table "+family+" (chain first, type ")
				}
				n.run("delete table "+family+"\n", "nft", "-f", "-")
			}
			n.run("table ip other {\nchain late {\ntype filter hook prerouting priority 0;\nip daddr 169.254.169.254 drop\n}\n}\n", "nft", "-f", "-")
			assert.Empty(t, earlier(), "a table that comes later")
			n.run("delete table ip other\n", "nft", "-f", "-")
		})
	}
}
