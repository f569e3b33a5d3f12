package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
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
	part              string // of Run's work, for logs and metrics
	purpose           string // what its rules do
	table, hook, name string
	// anywhere: rules of others may come before the jump. It is written first all the
	// same.
	anywhere bool
	rules    []string
}

// The chains that may be of our making, without their rules.
var (
	guardChain = chain{
		part: partGuard, purpose: "the guard that drops what is forwarded to or from the metadata service",
		table: "mangle", hook: "FORWARD", name: "nmi-guard",
	}
	// The name is that of the old NMI, so that its chain is taken over, and tools that
	// look for it go on working.
	redirectChain = chain{
		part: partRedirect, purpose: "the redirect of pods' requests to the agent",
		table: "nat", hook: "PREROUTING", name: "aad-metadata",
	}
	wireserverChain = chain{
		part: partWireserver, purpose: "the rule that rejects what pods send to the wireserver",
		table: "filter", hook: "FORWARD", name: "nmi-wireserver",
	}
	inputChain = chain{
		part: partInput, purpose: "the rule that drops connections to the agent's port that were not redirected",
		table: "mangle", hook: "INPUT", name: "nmi-input",
	}
	// Calico keeps its own jump first in PREROUTING of raw, and its chain drops forged
	// packets too: who comes first there is not worth a fight.
	antispoofChain = chain{
		part: partAntispoof, purpose: "the rule that drops packets that claim to come from the metadata service and do not",
		table: "raw", hook: "PREROUTING", name: "nmi-antispoof", anywhere: true,
	}

	// ours are all of them, in the order to remove them in: as long as a fence
	// stands, pods are refused.
	ours = []chain{redirectChain, wireserverChain, inputChain, antispoofChain, guardChain}
)

// mentionsOurs reports whether a line of iptables -S is of or about a chain of ours.
func mentionsOurs(line string) bool {
	return slices.ContainsFunc(ours, func(c chain) bool { return strings.Contains(line, c.name) })
}

// with returns the chain with these rules.
func (c chain) with(rules ...string) chain {
	for i, rule := range rules {
		rules[i] = "-A " + c.name + " " + rule
	}
	c.rules = rules
	return c
}

// desired are the chains that the configuration asks for in a mode other than
// AutoMode, in the order to write them in: the guard is there before anything is
// redirected.
func desired(cfg Config, mode Mode) []chain {
	metadata := cfg.Metadata.Addr()
	// No packet to or from the metadata service is forwarded with good reason: the
	// agent serves excepted pods too. The nat table sees the first packet of a
	// connection alone, and not that of one that conntrack takes for an answer
	// (a forged packet from the metadata service is enough) or does not track. In
	// mangle an ACCEPT of the filter table, whoever wrote it, comes too late.
	want := []chain{guardChain.with(
		fmt.Sprintf("-d %s/32 -j DROP", metadata),
		fmt.Sprintf("-s %s/32 -j DROP", metadata),
	)}
	match := fmt.Sprintf("-d %s/32 -p tcp -m tcp --dport %d ", metadata, cfg.Metadata.Port())
	switch mode {
	case Redirect:
		want = append(want, redirectChain.with(match+fmt.Sprintf("-j REDIRECT --to-ports %d", cfg.Port)))
	case DNAT:
		want = append(want, redirectChain.with(match+"-j DNAT --to-destination "+netip.AddrPortFrom(cfg.Address, cfg.Port).String()))
	}
	if cfg.BlockWireserver {
		want = append(want, wireserverChain.with(
			fmt.Sprintf("-d %s/32 -p tcp -m multiport --dports %s -j REJECT --reject-with tcp-reset", wireserver, wireserverPorts)))
	}
	return want
}

// hardening are the chains that the agent can do without: they keep a pod with many
// packets from hurting others, and no token depends on them.
func hardening(cfg Config, mode Mode) (want []chain) {
	// The agent refuses a connection that was not redirected, but only after the kernel
	// has shaken hands for it. A redirect of others, which mode None is for, need not be
	// conntrack's (Cilium's is eBPF's). As with the guard, mangle comes before any ACCEPT
	// of the filter table; and nobody else writes to INPUT of mangle, where kubelet,
	// kube-proxy and Calico all insert theirs first in INPUT of filter.
	if mode != None {
		want = append(want, inputChain.with(
			fmt.Sprintf("! -i lo -p tcp -m tcp --dport %d -m conntrack ! --ctstate DNAT -j DROP", cfg.Port)))
	}
	// Packets that seem to come from the metadata service make conntrack entries for
	// connections of the node that it has yet to open. What the real one answers then is
	// INVALID, which some nodes drop. raw comes before conntrack. A lookup of the route
	// back (rpfilter of iptables-extensions(8)) tells them apart, whatever rp_filter says.
	return append(want, antispoofChain.with(
		fmt.Sprintf("-s %s/32 -m rpfilter --invert -j DROP", cfg.Metadata.Addr())))
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

// place says where the jump must be.
func (c chain) place() string {
	if c.anywhere {
		return fmt.Sprintf("in %s of the table %s", c.hook, c.table)
	}
	return fmt.Sprintf("first in %s of the table %s", c.hook, c.table)
}

// jumps lists the rules of the hook that lead into our chain, however they are
// written, and whether ours is the only one and comes first (unless anywhere). Rules before it that
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
	return found, len(found) == 1 && (first == s.jump() || s.anywhere && found[0] == s.jump())
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
