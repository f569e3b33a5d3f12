package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Chain holds the redirect, and is ours alone. The name is that of the old NMI,
// so that its chain is taken over, and tools that look for it go on working.
const Chain = "aad-metadata"

// wireserverChain holds the rule of BlockWireserver.
const wireserverChain = "nmi-wireserver"

// wireserver is the other service that Azure gives every virtual machine: the
// host's agent. To whoever asks on these ports it gives the machine's
// configuration, certificates and bootstrap secrets included; on port 53 it is
// the resolver, which pods need.
// https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
var wireserver = netip.MustParseAddr("168.63.129.16")

const wireserverPorts = "80,32526"

// chain is one of our chains: where it hangs, and the rules in it, in the words of
// iptables -S. It is a value: equal configurations make equal chains.
type chain struct {
	table, hook, name string
	rules             []string
}

// ours are the chains that may be of our making, without their rules.
var ours = []chain{
	{table: "nat", hook: "PREROUTING", name: Chain},
	{table: "filter", hook: "FORWARD", name: wireserverChain},
}

// desired are the chains that the configuration asks for in a mode other than
// AutoMode, the redirect first.
func desired(cfg Config, mode Mode) []chain {
	var want []chain
	redirect, guard := ours[0], ours[1]
	match := fmt.Sprintf("-A %s -d %s/32 -p tcp -m tcp --dport %d ", redirect.name, cfg.Metadata.Addr(), cfg.Metadata.Port())
	switch mode {
	case Redirect:
		redirect.rules = []string{match + fmt.Sprintf("-j REDIRECT --to-ports %d", cfg.Port)}
		want = append(want, redirect)
	case DNAT:
		redirect.rules = []string{match + "-j DNAT --to-destination " + netip.AddrPortFrom(cfg.Address, cfg.Port).String()}
		want = append(want, redirect)
	}
	if cfg.BlockWireserver {
		guard.rules = []string{fmt.Sprintf("-A %s -d %s/32 -p tcp -m multiport --dports %s -j REJECT --reject-with tcp-reset", guard.name, wireserver, wireserverPorts)}
		want = append(want, guard)
	}
	return want
}

// state is what iptables -S says of a chain of ours and of the hook that it hangs
// from.
type state struct {
	chain
	hookRules []string // policy line included
	exists    bool     // there is a chain of our name; rules are what is in it
}

// jump is the only rule that may lead into the chain, and must be the first of
// its hook.
func (c chain) jump() string { return "-A " + c.hook + " -j " + c.name }

// jumps lists the rules of the hook that lead into our chain, however they are
// written, and whether the hook starts with ours and has no other.
func (s state) jumps() (found []string, inPlace bool) {
	rules := slices.DeleteFunc(slices.Clone(s.hookRules), func(line string) bool { return !strings.HasPrefix(line, "-A ") })
	for _, rule := range rules {
		if strings.HasSuffix(rule, " -j "+s.name) || strings.Contains(rule, " -j "+s.name+" ") {
			found = append(found, rule)
		}
	}
	return found, len(found) == 1 && rules[0] == s.jump()
}

// install returns the input of iptables-restore --noflush that gives the chain
// these rules in a single transaction, or "" if it has them already. A chain
// that somebody else filled (an old NMI) is taken over; jumps that are doubled,
// or no longer first, are replaced by one in the first place.
func (s state) install(rules []string) string {
	found, inPlace := s.jumps()
	if inPlace && s.exists && slices.Equal(s.rules, rules) {
		return ""
	}
	lines := []string{
		"*" + s.table,
		":" + s.name + " - [0:0]", // makes the chain, or empties it
		"-F " + s.name,
	}
	lines = append(lines, rules...)
	lines = append(lines, deletions(found)...)
	lines = append(lines, "-I "+s.hook+" 1 -j "+s.name, "COMMIT", "")
	return strings.Join(lines, "\n")
}

// remove returns the inputs that leave nothing of the chain there. The chain
// itself goes in a transaction of its own: it cannot while somebody else's rule
// leads to it.
func (s state) remove() []string {
	found, _ := s.jumps()
	if len(found) == 0 && !s.exists {
		return nil
	}
	lines := append([]string{"*" + s.table}, deletions(found)...)
	if !s.exists {
		return []string{strings.Join(append(lines, "COMMIT", ""), "\n")}
	}
	return []string{
		strings.Join(append(lines, "-F "+s.name, "COMMIT", ""), "\n"),
		strings.Join([]string{"*" + s.table, "-X " + s.name, "COMMIT", ""}, "\n"),
	}
}

func deletions(rules []string) []string {
	out := make([]string, len(rules))
	for i, rule := range rules {
		out[i] = "-D " + strings.TrimPrefix(rule, "-A ")
	}
	return out
}
