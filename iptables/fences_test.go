package iptables_test

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testlog"
	"github.com/podidentity/nmi/iptables"
)

const (
	partRouting  = "routing"
	partGuard    = "guard"
	partRedirect = "redirect"
	partInput    = "input"
)

// ipRules is what ip-rule(8) says of the node's rules before the main table.
func (n *node) ipRules() string {
	n.t.Helper()
	return n.run("", "ip", "-4", "rule", "list")
}

const routingFence = `10:	from all to 169.254.169.254 iif lo goto 12
11:	from all to 169.254.169.254 prohibit
12:	from all nop
`

func (n *node) guard() string {
	n.t.Helper()
	_, rules, _ := strings.Cut(n.iptablesOn(n.backend, "mangle", "-S", "nmi-guard"), "-N nmi-guard\n")
	return rules
}

func TestFences(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			before := n.ipRules()
			stop := n.redirect(iptables.Redirect)
			assert.Contains(t, n.ipRules(), routingFence)
			assert.Equal(t, 3, strings.Count(n.run("", "ip", "-details", "rule", "list", "to", "169.254.169.254"), "proto kernel")+strings.Count(n.run("", "ip", "-details", "rule", "list", "pref", "12"), "proto kernel"),
				"systemd-networkd leaves these alone")
			assert.Equal(t, "-A nmi-guard -d 169.254.169.254/32 -j DROP\n-A nmi-guard -s 169.254.169.254/32 -j DROP\n", n.guard())
			assert.Contains(t, n.iptablesOn(backend, "mangle", "-S", "FORWARD"), "-A FORWARD -j nmi-guard")

			// The kernel looks up the source of the replies by the same rules.
			for _, setting := range []string{"0", "1", "2"} {
				n.rpFilter(n.network.Uplink.Name, setting)
				assert.Equal(t, "imds", n.askFromNode(), "rp_filter %s", setting)
			}

			stop()
			for range 2 {
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))
				assert.Equal(t, before, n.ipRules())
				assert.NotContains(t, n.iptablesOn(backend, "mangle", "-S"), "nmi-guard")
			}
		})
	}
}

func TestFencesInModeNone(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.DNAT)()
			before := n.iptables("-S")
			n.redirect(iptables.None)()
			assert.Equal(t, before, n.iptables("-S"), "a redirect from before stays")
			require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.DNAT)))
			before = n.iptables("-S")
			n.redirect(iptables.None)
			assert.Equal(t, before, n.iptables("-S"))
			assert.Contains(t, n.ipRules(), routingFence)
			assert.Contains(t, n.guard(), "-j DROP")
			assert.Empty(t, askFor(n.pod, aMoment), "no redirect")
			assert.Equal(t, "imds", n.askFromNode())
			assert.EqualValues(t, 1, n.leaks.Load(), "the node's own request")
		})
	}
}

// Without the iptables commands, or where the node forbids their rules, the routing fence
// remains.
func TestRoutingFenceWithoutIptables(t *testing.T) {
	refusing := t.TempDir()
	for _, name := range []string{"iptables-nft", "iptables-nft-restore"} {
		writeScript(t, refusing+"/"+name, `[ "$1" = --version ] && echo "iptables v1.8.9 (nf_tables)" && exit; echo 'iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)' >&2; exit 4`)
	}
	for name, tc := range map[string]struct {
		path, says string
		cause      iptables.Cause
	}{
		"no commands": {"/nowhere", "install the iptables package", iptables.CauseMissingTool},
		"EPERM":       {refusing, "kubernetes.azure.com/ebpf-host-routing=true", iptables.CausePermission},
	} {
		for _, mode := range []iptables.Mode{iptables.Redirect, iptables.None} {
			t.Run(name+", mode "+string(mode), func(t *testing.T) {
				n := newNode(t, iptables.NFT, testbed.Ptp)
				path := setPath(t, tc.path)
				r, err := iptables.New(n.config(mode))
				require.NoError(t, err, "other rules can be written")
				n.start(r)
				if mode == iptables.None {
					n.eventually(func() bool { return r.Status().Err == nil }, "ready")
					require.Len(t, r.Status().Notes, 1)
					assert.Contains(t, r.Status().Notes[0], tc.says)
				} else {
					n.eventually(func() bool { return r.Stats().Checks > 0 }, "checked")
					assert.ErrorContains(t, r.Status().Err, tc.says)
				}
				path()
				assert.Positive(t, r.Stats().Errors[tc.cause])
				assert.True(t, r.Status().InPlace["routing"])
				assert.False(t, r.Status().InPlace["guard"])
				assert.Contains(t, n.ipRules(), routingFence)
				assert.Empty(t, askFor(n.pod, aMoment))
				assert.Zero(t, n.leaks.Load())
			})
		}
	}
}

// The node forbids rules from some time on: mode auto has chosen them, and says what to do now.
func TestRulesForbiddenLater(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	dir := t.TempDir()
	for _, name := range []string{"iptables-nft", "iptables-nft-restore"} {
		real, err := exec.LookPath(name)
		require.NoError(t, err)
		writeScript(t, dir+"/"+name, `[ -e `+dir+`/forbidden ] && echo 'iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)' >&2 && exit 4; exec `+real+` "$@"`)
	}
	setPath(t, dir+":"+os.Getenv("PATH"))
	cfg := n.config(iptables.ModeAuto)
	pods := &testbed.PodList{}
	pods.Set(n.pod.Addr)
	cfg.Pods = pods.Addresses
	r, _ := n.reconcile(cfg)
	require.NoError(t, r.Status().Err)
	require.NoError(t, os.WriteFile(dir+"/forbidden", nil, 0o600))
	n.run("", "ip", "rule", "del", "pref", "11") // so that it looks
	n.eventually(func() bool { return r.Status().Err != nil }, "noticed")
	status := r.Status()
	assert.ErrorContains(t, status.Err, "the chart's nmi.redirectMode=ebpf")
	assert.ErrorContains(t, status.Err, "mode auto cannot use programs in the place of rules either", "these tests run in no pod")
	assert.Equal(t, iptables.RulesRefused, status.Problem())
	assert.Contains(t, n.ipRules(), routingFence, "what can be written is")
	assert.Empty(t, askFor(n.pod, aMoment), "and pods are refused")
	assert.Zero(t, n.leaks.Load())
}

// An agent that only starts, and may never serve, removes no fence.
func TestFenceKeepsOtherAgentsFences(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			first, err := iptables.New(n.config(iptables.Redirect))
			require.NoError(t, err)
			require.NoError(t, first.Fence(t.Context()))
			assert.Empty(t, askFor(n.pod, aMoment))
			guard := n.iptablesOn(backend, "mangle", "-S")

			cfg := n.config(iptables.Redirect)
			cfg.Metadata = netip.MustParseAddrPort("169.254.169.253:80")
			second, err := iptables.New(cfg)
			require.NoError(t, err)
			require.NoError(t, second.Fence(t.Context()))
			assert.Equal(t, guard, n.iptablesOn(backend, "mangle", "-S"))
			assert.Contains(t, n.ipRules(), "169.254.169.254 prohibit")
			assert.Contains(t, n.ipRules(), "169.254.169.253 prohibit")
			assert.Empty(t, askFor(n.pod, aMoment))
			assert.Zero(t, n.leaks.Load())
		})
	}
}

// Each fence is repaired; the other one is in place meanwhile, and nothing leaks.
func TestFenceRepair(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect)
			r, _ := n.reconcile(n.config(iptables.Redirect))
			n.askAllTheTime()
			for _, tc := range []struct {
				what   string
				parts  []string
				change func()
			}{
				{"the guard flushed", []string{partGuard}, func() { n.iptablesOn(backend, "mangle", "-F", "nmi-guard") }},
				{"mangle flushed", []string{partGuard, partInput}, func() { n.iptablesOn(backend, "mangle", "-F") }},
				{"the guard's jump deleted", []string{partGuard}, func() { n.iptablesOn(backend, "mangle", "-D", "FORWARD", "-j", "nmi-guard") }},
				{"prohibit deleted", []string{partRouting}, func() { n.run("", "ip", "rule", "del", "pref", "11") }},
				{"goto deleted", []string{partRouting}, func() { n.run("", "ip", "rule", "del", "pref", "10") }},
				{"its target deleted", []string{partRouting}, func() { n.run("", "ip", "rule", "del", "pref", "12") }},
				{"a rule above the guard", nil, func() { n.iptablesOn(backend, "mangle", "-I", "FORWARD", "1", "-j", "ACCEPT") }},
			} {
				before := r.Stats()
				tc.change()
				n.eventually(func() bool { return r.Stats().Repairs > before.Repairs }, tc.what)
				assert.Contains(t, n.ipRules(), routingFence, tc.what)
				assert.Contains(t, n.guard(), "-s 169.254.169.254/32 -j DROP", tc.what)
				assert.Equal(t, "-A FORWARD -j nmi-guard", n.forward("mangle")[0], tc.what)
				for part, lost := range r.Stats().Lost {
					if slices.Contains(tc.parts, part) {
						before.Lost[part]++
					}
					assert.Equal(t, before.Lost[part], lost, "%s: lost %s", tc.what, part)
				}
			}
		})
	}
}

// AKS's IMDS restriction, as written when the kubelet starts, in either table.
func TestDropRulesMayPrecedeOwn(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.agent(iptables.Redirect)
			cfg := n.config(iptables.Redirect)
			cfg.BlockWireserver = true
			r, _ := n.reconcile(cfg)
			for _, table := range []string{"mangle", "filter"} {
				repairs, checks := r.Stats().Repairs, r.Stats().Checks
				n.iptablesOn(backend, table, "-I", "FORWARD", "1", "!", "-s", testbed.NodeAddress, "-d", "169.254.169.254/32", "-p", "tcp", "-m", "tcp", "--dport", "80",
					"-m", "comment", "--comment", "AKS managed: added by AgentBaker ensureIMDSRestriction for IMDS restriction feature", "-j", "DROP")
				n.eventually(func() bool { return r.Stats().Checks > checks }, "seen in "+table)
				assert.NoError(t, r.Status().Err)
				assert.Equal(t, repairs, r.Stats().Repairs, "no repair in "+table)
				assert.Contains(t, n.forward(table)[0], "AKS managed", table)
				assert.Equal(t, "agent", n.ask())
				n.iptablesOn(backend, table, "-D", "FORWARD", "1")
			}
		})
	}
}

func TestPrecedingRoutingRules(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	others := []string{
		"pref 9 fwmark 0x200/0xf00 lookup 2004", // Cilium's, by their mark
		"pref 10 fwmark 0xa00/0xf00 lookup 2005",
		"pref 11 to 10.9.0.0/16 lookup main",
		"pref 12 iif lo lookup main",
		"pref 100 lookup main",
	}
	for _, rule := range others {
		n.run("", "ip", append([]string{"rule", "add"}, strings.Fields(rule)...)...)
		t.Cleanup(func() { n.run("", "ip", append([]string{"rule", "del"}, strings.Fields(rule)...)...) })
	}
	before := n.ipRules()
	r, stop := n.reconcile(n.config(iptables.Redirect))
	assert.Empty(t, notesOf(r, "policy routing"))
	assert.Equal(t, "imds", n.askFromNode())

	n.run("", "ip", "rule", "add", "pref", "5", "from", "10.244.0.0/16", "lookup", "main")
	n.eventually(func() bool { return notesOf(r, "5: from 10.244.0.0/16 lookup 254") != "" }, "noted")
	assert.NoError(t, r.Status().Err)
	n.agent(iptables.Redirect)
	assert.Equal(t, "agent", n.ask())
	n.run("", "ip", "rule", "del", "pref", "5")
	n.eventually(func() bool { return notesOf(r, "policy routing") == "" }, "gone")

	stop()
	require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))
	assert.Equal(t, before, n.ipRules())
}

func TestRoutingFenceForAnotherMetadataAddress(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	n.run("", "ip", "rule", "add", "pref", "12", "nop", "protocol", "kernel")
	n.run("", "ip", "rule", "add", "pref", "10", "to", "169.254.169.1", "iif", "lo", "goto", "12", "protocol", "kernel")
	n.run("", "ip", "rule", "add", "pref", "11", "to", "169.254.169.1", "prohibit", "protocol", "kernel")
	n.redirect(iptables.Redirect)
	assert.Contains(t, n.ipRules(), routingFence)
	assert.NotContains(t, n.ipRules(), "169.254.169.1 ")
}

func notesOf(r *iptables.Reconciler, about string) string {
	for _, note := range r.Status().Notes {
		if strings.Contains(note, about) {
			return note
		}
	}
	return ""
}

// forward lists the rules of FORWARD.
func (n *node) forward(table string) (rules []string) {
	n.t.Helper()
	for line := range strings.Lines(n.iptablesOn(n.backend, table, "-S", "FORWARD")) {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, strings.TrimSpace(line))
		}
	}
	return rules
}

func (n *node) rpFilter(link, setting string) {
	n.t.Helper()
	require.NoError(n.t, os.WriteFile("/proc/sys/net/ipv4/conf/"+link+"/rp_filter", []byte(setting), 0o644))
}

func writeScript(t *testing.T, path, script string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755))
}

// setPath hides the node's commands until the test ends or the returned function is
// called.
func setPath(t *testing.T, path string) (restore func()) {
	t.Helper()
	before := os.Getenv("PATH")
	restore = func() { require.NoError(t, os.Setenv("PATH", before)) }
	require.NoError(t, os.Setenv("PATH", path))
	t.Cleanup(restore)
	return restore
}

// The first repair after a quiet time is not delayed, and the log says what the impact on
// pods was.
func TestLostRulesAreLogged(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp) // legacy tables announce nothing
	var log testlog.Buffer
	cfg := n.config(iptables.Redirect)
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	r, stop := n.reconcile(cfg)
	assert.NotContains(t, log.String(), "level=WARN", "nothing is lost at the start")
	fastest := time.Hour
	loseAndRepair := func() {
		time.Sleep(1200 * time.Millisecond) // longer than debounce
		repairs := r.Stats().Repairs
		flushed := time.Now()
		n.iptables("-F", "PREROUTING")
		n.eventually(func() bool { return r.Stats().Repairs > repairs }, "repaired")
		fastest = min(fastest, time.Since(flushed))
	}
	for range 3 {
		loseAndRepair()
	}
	assert.Equal(t, 3, strings.Count(log.String(), `level=WARN msg="rules were removed or changed by another program" rules=[redirect] impact="pods' token requests were refused or dropped; a fence kept them from the metadata service"`), log.String())

	n.run("", "ip", "rule", "del", "pref", "11")
	n.eventually(func() bool { return strings.Contains(log.String(), "rules=[routing]") }, "said")
	assert.Contains(t, log.String(), "were served, and another fence was in place")

	// Changes by another agent that had taken over are no losses.
	stop()
	losses := strings.Count(log.String(), "rules were removed")
	n.redirect(iptables.DNAT)()
	repairs := r.Stats().Repairs
	n.start(r)
	n.eventually(func() bool { return r.Stats().Repairs > repairs }, "taken back")
	assert.Equal(t, losses, strings.Count(log.String(), "rules were removed"), log.String())

	const fast = 450 * time.Millisecond                      // since the start of the flush command
	for tries := 3; fastest >= fast && tries < 20; tries++ { // the machine may be busy
		loseAndRepair()
	}
	assert.Less(t, fastest, fast)
}
