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

// guardName and wireserverName are those of the chains that drop and reject.
const (
	guardName      = "nmi-guard"
	wireserverName = "nmi-wireserver"
)

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

// The chains that may be of our making, without their rules.
var (
	guardChain      = chain{table: "mangle", hook: "FORWARD", name: guardName}
	redirectChain   = chain{table: "nat", hook: "PREROUTING", name: Chain}
	wireserverChain = chain{table: "filter", hook: "FORWARD", name: wireserverName}

	// ours are all of them, in the order to remove them in: as long as a fence
	// stands, pods are refused.
	ours = []chain{redirectChain, wireserverChain, guardChain}
)

// mentionsOurs reports whether a line of iptables -S is of or about a chain of ours.
func mentionsOurs(line string) bool {
	return slices.ContainsFunc(ours, func(c chain) bool { return strings.Contains(line, c.name) })
}

// desired are the chains that the configuration asks for in a mode other than
// AutoMode, in the order to write them in: the guard is there before anything is
// redirected.
func desired(cfg Config, mode Mode) []chain {
	// No packet to or from the metadata service is forwarded with good reason: the
	// agent serves excepted pods too. The nat table sees the first packet of a
	// connection alone, and not that of one that conntrack takes for an answer
	// (a forged packet from the metadata service is enough) or does not track. In
	// mangle an ACCEPT of the filter table, whoever wrote it, comes too late.
	guard := guardChain
	guard.rules = []string{
		fmt.Sprintf("-A %s -d %s/32 -j DROP", guard.name, cfg.Metadata.Addr()),
		fmt.Sprintf("-A %s -s %s/32 -j DROP", guard.name, cfg.Metadata.Addr()),
	}
	want := []chain{guard}
	redirect, wire := redirectChain, wireserverChain
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
		wire.rules = []string{fmt.Sprintf("-A %s -d %s/32 -p tcp -m multiport --dports %s -j REJECT --reject-with tcp-reset", wire.name, wireserver, wireserverPorts)}
		want = append(want, wire)
	}
	return want
}

// state is what iptables -S says of a chain of ours and of the hook that it hangs
// from.
type state struct {
	chain
	hookRules []string
	exists    bool // there is a chain of our name; rules are what is in it
}

// jump is the only rule that may lead into the chain, and must be the first of
// its hook.
func (c chain) jump() string { return "-A " + c.hook + " -j " + c.name }

// jumps lists the rules of the hook that lead into our chain, however they are
// written, and whether ours is the only one and comes first. Rules before it that
// can only drop take nothing from it, and stay: AKS's IMDS restriction inserts such
// a one in the first place each time that the kubelet starts (AgentBaker's
// ensure_imds_restriction.sh), in FORWARD of mangle or of filter.
func (s state) jumps() (found []string, inPlace bool) {
	first := ""
	for _, rule := range s.hookRules {
		if strings.HasSuffix(rule, " -j "+s.name) || strings.Contains(rule, " -j "+s.name+" ") {
			found = append(found, rule)
		}
		if first == "" && !strings.HasSuffix(rule, " -j DROP") {
			first = rule
		}
	}
	return found, len(found) == 1 && first == s.jump()
}

// holds reports whether the chain has these rules, and packets get there if no rule
// before the jump stops them.
func (s state) holds(rules []string) bool {
	return s.exists && slices.Equal(s.rules, rules) && slices.Contains(s.hookRules, s.jump())
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
