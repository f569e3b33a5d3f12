package iptables

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	metadata = netip.MustParseAddrPort("169.254.169.254:80")
	config   = Config{Metadata: metadata, Port: 2579, Address: DefaultAddress}
)

func TestDesired(t *testing.T) {
	const guard = "-A nmi-wireserver -d 168.63.129.16/32 -p tcp -m multiport --dports 80,32526 -j REJECT --reject-with tcp-reset"
	for mode, want := range map[Mode][]string{
		Redirect: {"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579"},
		DNAT:     {"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:2579"},
		None:     nil,
	} {
		assert.Equal(t, want, rulesOf(desired(config, mode)), mode)
		guarded := config
		guarded.BlockWireserver = true
		assert.Equal(t, append(want, guard), rulesOf(desired(guarded, mode)), mode)
	}
	guarded := config
	guarded.BlockWireserver = true
	last := desired(guarded, DNAT)[1]
	assert.Equal(t, "-A FORWARD -j nmi-wireserver", last.jump())
	assert.Equal(t, "filter", last.table)
}

func rulesOf(chains []chain) (rules []string) {
	for _, c := range chains {
		rules = append(rules, c.rules...)
	}
	return rules
}

// have is a state of the chain of the redirect.
func have(hookRules, rules []string, exists bool) state {
	c := ours[0]
	c.rules = rules
	return state{chain: c, hookRules: hookRules, exists: exists}
}

func TestInstall(t *testing.T) {
	const (
		policy = "-P PREROUTING ACCEPT"
		kube   = "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES"
		ours   = "-A PREROUTING -j aad-metadata"
		twin   = "-A PREROUTING -i eth0 -j aad-metadata"
		head   = "*nat\n:aad-metadata - [0:0]\n-F aad-metadata\n-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579\n"
		tail   = "-I PREROUTING 1 -j aad-metadata\nCOMMIT\n"
	)
	redirect := desired(config, Redirect)[0].rules
	old := []string{
		"-A aad-metadata ! -s 127.0.0.1/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:2579",
		"-A aad-metadata -j RETURN",
	}
	for name, tc := range map[string]struct {
		have state
		want string
	}{
		"nothing there":       {have([]string{policy}, nil, false), head + tail},
		"all in place":        {have([]string{policy, ours, kube}, redirect, true), ""},
		"below another's":     {have([]string{policy, kube, ours}, redirect, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"doubled":             {have([]string{policy, ours, ours}, redirect, true), head + "-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n" + tail},
		"a narrower jump":     {have([]string{policy, twin}, redirect, true), head + "-D PREROUTING -i eth0 -j aad-metadata\n" + tail},
		"jump gone":           {have([]string{policy, kube}, redirect, true), head + tail},
		"chain empty":         {have([]string{policy, ours}, nil, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"old NMI's":           {have([]string{policy, ours}, old, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
		"a chain of our mode": {have([]string{policy, ours}, desired(config, DNAT)[0].rules, true), head + "-D PREROUTING -j aad-metadata\n" + tail},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, tc.want, tc.have.install(redirect)) })
	}
}

func TestRemove(t *testing.T) {
	policy, jump := "-P PREROUTING ACCEPT", "-A PREROUTING -j aad-metadata"
	assert.Empty(t, have([]string{policy, "-A PREROUTING -j KUBE-SERVICES"}, nil, false).remove())
	gone := "*nat\n-X aad-metadata\nCOMMIT\n"
	assert.Equal(t, []string{"*nat\n-F aad-metadata\nCOMMIT\n", gone}, have([]string{policy}, nil, true).remove())
	assert.Equal(t, []string{"*nat\n-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n-F aad-metadata\nCOMMIT\n", gone},
		have([]string{policy, jump, jump}, nil, true).remove())
}

func TestParseMode(t *testing.T) {
	for _, m := range Modes {
		got, err := ParseMode(string(m))
		require.NoError(t, err)
		assert.Equal(t, m, got)
	}
	_, err := ParseMode("REDIRECT")
	assert.EqualError(t, err, `"REDIRECT" is not a redirect mode: use "auto", "redirect", "dnat" or "none"`)
}

func TestToolErrorsSayWhatToDo(t *testing.T) {
	for text, want := range map[string]string{
		"iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n": "run as root",
		"Another app is currently holding the xtables lock. Stopped waiting after 10s.":                               "another program holds the xtables lock",
		"can't initialize iptables table `nat': Table does not exist (do you need to insmod?)":                        "the kernel lacks the table",
	} {
		err := toolError("reading the nat table", text)
		assert.ErrorContains(t, err, want)
		assert.NotContains(t, err.Error(), "\n")
	}
}
