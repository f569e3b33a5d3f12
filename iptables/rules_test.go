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
	assert.Equal(t, []string{"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579"}, desired(config, Redirect))
	assert.Equal(t, []string{"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:2579"}, desired(config, DNAT))
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
	old := []string{
		"-A aad-metadata ! -s 127.0.0.1/32 -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:2579",
		"-A aad-metadata -j RETURN",
	}
	for name, tc := range map[string]struct {
		have state
		want string
	}{
		"nothing there":       {state{hook: []string{policy}}, head + tail},
		"all in place":        {state{hook: []string{policy, ours, kube}, chain: desired(config, Redirect), exists: true}, ""},
		"below another's":     {state{hook: []string{policy, kube, ours}, chain: desired(config, Redirect), exists: true}, head + "-D PREROUTING -j aad-metadata\n" + tail},
		"doubled":             {state{hook: []string{policy, ours, ours}, chain: desired(config, Redirect), exists: true}, head + "-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n" + tail},
		"a narrower jump":     {state{hook: []string{policy, twin}, chain: desired(config, Redirect), exists: true}, head + "-D PREROUTING -i eth0 -j aad-metadata\n" + tail},
		"jump gone":           {state{hook: []string{policy, kube}, chain: desired(config, Redirect), exists: true}, head + tail},
		"chain empty":         {state{hook: []string{policy, ours}, exists: true}, head + "-D PREROUTING -j aad-metadata\n" + tail},
		"old NMI's":           {state{hook: []string{policy, ours}, chain: old, exists: true}, head + "-D PREROUTING -j aad-metadata\n" + tail},
		"a chain of our mode": {state{hook: []string{policy, ours}, chain: desired(config, DNAT), exists: true}, head + "-D PREROUTING -j aad-metadata\n" + tail},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, tc.want, tc.have.install(desired(config, Redirect))) })
	}
}

func TestRemove(t *testing.T) {
	policy, ours := "-P PREROUTING ACCEPT", "-A PREROUTING -j aad-metadata"
	assert.Empty(t, state{hook: []string{policy, "-A PREROUTING -j KUBE-SERVICES"}}.remove())
	gone := "*nat\n-X aad-metadata\nCOMMIT\n"
	assert.Equal(t, []string{"*nat\n-F aad-metadata\nCOMMIT\n", gone}, state{hook: []string{policy}, exists: true}.remove())
	assert.Equal(t, []string{"*nat\n-D PREROUTING -j aad-metadata\n-D PREROUTING -j aad-metadata\n-F aad-metadata\nCOMMIT\n", gone},
		state{hook: []string{policy, ours, ours}, exists: true}.remove())
}

func TestParseMode(t *testing.T) {
	for _, m := range Modes {
		got, err := ParseMode(string(m))
		require.NoError(t, err)
		assert.Equal(t, m, got)
	}
	_, err := ParseMode("REDIRECT")
	assert.EqualError(t, err, `"REDIRECT" is not a redirect mode: use "auto", "redirect" or "dnat"`)
}

func TestToolErrorsSayWhatToDo(t *testing.T) {
	for text, want := range map[string]string{
		"iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n": "run as root",
		"Another app is currently holding the xtables lock. Stopped waiting after 10s.":                               "another program holds the xtables lock",
		"can't initialize iptables table `nat': Table does not exist (do you need to insmod?)":                        "the kernel has no nat table",
	} {
		err := toolError("reading the nat table", text)
		assert.ErrorContains(t, err, want)
		assert.NotContains(t, err.Error(), "\n")
	}
}
