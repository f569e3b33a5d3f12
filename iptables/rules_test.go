package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/iptables/ebpf"
)

var (
	metadata = netip.MustParseAddrPort("169.254.169.254:80")
	config   = Config{Metadata: metadata, Port: 2579, Address: DefaultAddress}
)

func TestDesired(t *testing.T) {
	const wire = "-A nmi-wireserver -d 168.63.129.16/32 -p tcp -m multiport --dports 80,32526 -j REJECT --reject-with tcp-reset"
	guard := []string{"-A nmi-guard -d 169.254.169.254/32 -j DROP", "-A nmi-guard -s 169.254.169.254/32 -j DROP"}
	for mode, redirect := range map[Mode][]string{
		Redirect: {"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579"},
		DNAT:     {"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:2579"},
		None:     nil,
	} {
		want := slices.Concat(guard, redirect)
		assert.Equal(t, want, rulesOf(desired(config, mode)), "%s: the guard before the redirect", mode)
		blocking := config
		blocking.BlockWireserver = true
		assert.Equal(t, append(want, wire), rulesOf(desired(blocking, mode)), mode)
	}
	assert.Equal(t, "-A FORWARD -j nmi-guard", guardChain.jump())
	assert.Equal(t, "mangle", guardChain.table)
	assert.Equal(t, "-A FORWARD -j nmi-wireserver", wireserverChain.jump())
	assert.Equal(t, "filter", wireserverChain.table)
}

func TestHardening(t *testing.T) {
	const (
		input     = "-A nmi-input ! -i lo -p tcp -m tcp --dport 2579 -m conntrack ! --ctstate DNAT -j DROP"
		antispoof = "-A nmi-antispoof -s 169.254.169.254/32 -m rpfilter --invert -j DROP"
	)
	for mode, want := range map[Mode][]string{Redirect: {input, antispoof}, DNAT: {input, antispoof}, None: {antispoof}} {
		assert.Equal(t, want, rulesOf(hardening(config, mode)), mode)
	}
	assert.ElementsMatch(t, []string{"mangle", "nat", "raw"}, (&Reconciler{cfg: Config{Mode: ModeAuto}}).tables(), "legacy tables to poll")
	assert.Equal(t, "-A INPUT -j nmi-input", inputChain.jump())
	assert.Equal(t, "mangle", inputChain.table)
	assert.Equal(t, "-A PREROUTING -j nmi-antispoof", antispoofChain.jump())
	assert.Equal(t, "raw", antispoofChain.table)
}

// Calico's jump in raw may come first: its chain drops forged packets, too.
func TestAntispoofAfterCalico(t *testing.T) {
	const calico, jump = "-A PREROUTING -j cali-PREROUTING", "-A PREROUTING -j nmi-antispoof"
	want := hardening(config, None)[0]
	for _, hook := range [][]string{{jump}, {calico, jump}, {jump, calico}} {
		assert.Empty(t, state{chain: want, hookRules: hook, exists: true}.install(want.rules), hook)
	}
	for _, hook := range [][]string{nil, {calico}, {calico, jump, jump}, {calico, "-A PREROUTING -i eth0 -j nmi-antispoof"}} {
		assert.Contains(t, state{chain: want, hookRules: hook, exists: true}.install(want.rules), "-I PREROUTING 1 -j nmi-antispoof\n", hook)
	}
}

func rulesOf(chains []chain) (rules []string) {
	for _, c := range chains {
		rules = append(rules, c.rules...)
	}
	return rules
}

// have returns a state of the redirect's chain.
func have(hookRules, rules []string, exists bool) state {
	c := redirectChain
	c.rules = rules
	return state{chain: c, hookRules: hookRules, exists: exists}
}

func TestInstall(t *testing.T) {
	const (
		kube = "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES"
		ours = "-A PREROUTING -j aad-metadata"
		drop = "-A PREROUTING ! -s 10.0.0.4/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment \"AKS managed: added by AgentBaker ensureIMDSRestriction for IMDS restriction feature\" -j DROP"
		twin = "-A PREROUTING -i eth0 -j aad-metadata"
		head = "*nat\n:aad-metadata - [0:0]\n-F aad-metadata\n-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579\n"
		tail = "-I PREROUTING 1 -j aad-metadata\nCOMMIT\n"
	)
	redirect := desired(config, Redirect)[1].rules
	old := []string{
		"-A aad-metadata ! -s 127.0.0.1/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:2579",
		"-A aad-metadata -j RETURN",
	}
	for name, tc := range map[string]struct {
		have state
		want string
	}{
		"nothing there":                  {have(nil, nil, false), head + tail},
		"all in place":                   {have([]string{ours, kube}, redirect, true), ""},
		"below another's DROP":           {have([]string{drop, ours, kube}, redirect, true), ""},
		"below one's DROP and another's": {have([]string{drop, kube, ours}, redirect, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"below another's":                {have([]string{kube, ours}, redirect, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"doubled":                        {have([]string{ours, ours}, redirect, true), head + "-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n" + tail},
		"a narrower jump":                {have([]string{twin}, redirect, true), head + "-D PREROUTING -i eth0 -j aad-metadata\n" + tail},
		"jump gone":                      {have([]string{kube}, redirect, true), head + tail},
		"chain empty":                    {have([]string{ours}, nil, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"old NMI's":                      {have([]string{ours}, old, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"a chain of our mode":            {have([]string{ours}, desired(config, DNAT)[1].rules, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, tc.want, tc.have.install(redirect)) })
	}
}

func TestRemove(t *testing.T) {
	const jump = "-A PREROUTING -j aad-metadata"
	assert.Empty(t, have([]string{"-A PREROUTING -j KUBE-SERVICES"}, nil, false).remove())
	gone := "*nat\n-X aad-metadata\nCOMMIT\n"
	assert.Equal(t, []string{"*nat\n-F aad-metadata\nCOMMIT\n", gone}, have(nil, nil, true).remove())
	assert.Equal(t, []string{"*nat\n-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n-F aad-metadata\nCOMMIT\n", gone},
		have([]string{jump, jump}, nil, true).remove())
}

func TestParseMode(t *testing.T) {
	for _, m := range []Mode{ModeAuto, Redirect, DNAT, None} {
		got, err := ParseMode(string(m))
		require.NoError(t, err)
		assert.Equal(t, m, got)
	}
	_, err := ParseMode("REDIRECT")
	assert.EqualError(t, err, `"REDIRECT" is not a redirect mode: use "auto", "redirect", "dnat", "ebpf" or "none"`)
}

func TestToolError(t *testing.T) {
	for text, want := range map[string]string{
		"iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n": "the node may forbid iptables rules, as AKS nodes with eBPF host routing do (label kubernetes.azure.com/ebpf-host-routing=true)",
		"iptables-nft-restore v1.8.9: line 4: RULE_APPEND failed (Operation not permitted): rule in chain nmi-guard":  "the node may forbid iptables rules",
		"Another app is currently holding the xtables lock. Stopped waiting after 10s.":                               "another program holds the xtables lock",
		"can't initialize iptables table `nat': Table does not exist (do you need to insmod?)":                        "the kernel lacks the table",
	} {
		err := toolError("reading the nat table", text)
		assert.ErrorContains(t, err, want)
		assert.NotContains(t, err.Error(), "\n")
		assert.NotEqual(t, CauseOther, causeOf(err), text)
	}
	assert.Equal(t, CauseOther, causeOf(toolError("reading", "Segmentation fault")))
	err := permissionAdvice([]string{"NET_RAW"})
	assert.EqualError(t, err, "run as root with the capabilities NET_ADMIN and NET_RAW (missing: NET_RAW)")
}

func TestAdvise(t *testing.T) {
	assert.ErrorContains(t, advise(nil), "delete the agent's pod")
	err := advise(fmt.Errorf("%w (missing: BPF)", ebpf.ErrPrivileges))
	assert.ErrorContains(t, err, "set the chart's value nmi.redirectMode=auto, or ebpf")
	assert.ErrorContains(t, err, "(missing: BPF)")
	err = advise(errors.New("the kubelet uses cgroup v1"))
	assert.ErrorContains(t, err, "either: the kubelet uses cgroup v1")
	assert.NotContains(t, err.Error(), "nmi.redirectMode", "it would not help")
}

func TestImpact(t *testing.T) {
	for name, tc := range map[string]struct {
		lost, down []string
		want       string
	}{
		"the redirect":           {[]string{partRedirect}, nil, "refused or dropped; a fence kept them"},
		"the redirect, a fence":  {[]string{partRouting, partRedirect}, []string{partEgress, partRouting}, "refused or dropped; a fence kept them"},
		"a fence":                {[]string{partGuard}, []string{partEgress, partGuard}, "were served, and another fence was in place"},
		"both fences":            {[]string{partRouting, partGuard}, []string{partEgress, partRouting, partGuard}, "tokens of the node's identities"},
		"all":                    {[]string{partRouting, partGuard, partRedirect}, []string{partEgress, partRouting, partGuard}, "tokens of the node's identities"},
		"one, the other refused": {[]string{partRouting}, []string{partEgress, partRouting, partGuard}, "tokens of the node's identities"},
		"all but egress":         {[]string{partRouting, partGuard}, []string{partRouting, partGuard}, "another fence was in place"},
		"egress":                 {[]string{partEgress}, []string{partEgress, partGuard}, "another fence was in place"},
		"the wireserver's":       {[]string{partWireserver}, nil, "may have reached the wireserver"},
		"input":                  {[]string{partInput}, nil, "the agent itself had to refuse"},
		"antispoof":              {[]string{partAntispoof}, nil, "may have kept the node from the metadata service"},
	} {
		assert.Contains(t, impact(tc.lost, tc.down), tc.want, name)
	}
}
