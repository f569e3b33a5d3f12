package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// wireserver is Azure's other service for virtual machines. On these ports it serves the
// machine's configuration, including certificates and bootstrap secrets, to any client;
// on port 53 it is the DNS resolver, which pods need.
// https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
var wireserver = netip.MustParseAddr("168.63.129.16")

const wireserverPorts = "80,32526"

// chain is one of the agent's own chains: the hook that jumps to it, and its rules in
// the syntax of iptables -S. It is a value: equal configurations make equal chains.
type chain struct {
	part              string // for logs and metrics
	purpose           string // what its rules do, for errors
	table, hook, name string
	anywhere          bool // the jump is inserted first, but need not stay first
	rules             []string
}

// The agent's own chains, without their rules.
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
	// packets too: competing with it for the first place would gain nothing.
	antispoofChain = chain{
		part: partAntispoof, purpose: "the rule that drops packets that claim to come from the metadata service and do not",
		table: "raw", hook: "PREROUTING", name: "nmi-antispoof", anywhere: true,
	}

	// ownChains are all of them, in the order to remove them in: pods are refused as
	// long as a fence is in place.
	ownChains = []chain{redirectChain, wireserverChain, inputChain, antispoofChain, guardChain}
)

// mentionsOwnChain reports whether a line of iptables -S is a rule in or a jump to one of
// the agent's own chains.
func mentionsOwnChain(line string) bool {
	return slices.ContainsFunc(ownChains, func(c chain) bool { return strings.Contains(line, c.name) })
}

// with returns the chain with these rules.
func (c chain) with(rules ...string) chain {
	for i, rule := range rules {
		rules[i] = "-A " + c.name + " " + rule
	}
	c.rules = rules
	return c
}

// desired returns the chains that the configuration requires in a mode other than
// ModeAuto, in the order to write them in: the guard is in place before anything is
// redirected.
func desired(cfg Config, mode Mode) []chain {
	metadata := cfg.Metadata.Addr()
	// No packet to or from the metadata service is legitimately forwarded: the agent
	// serves excepted pods too. The nat table sees only the first packet of a connection,
	// and not even that if conntrack takes it for a reply (one forged packet from the
	// metadata service is enough) or does not track it. mangle comes before any ACCEPT
	// of the filter table.
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

// hardening returns the chains that are not required: they keep a pod's flood of packets
// from hurting others, and no token depends on them.
func hardening(cfg Config, mode Mode) (want []chain) {
	// The agent refuses a connection that was not redirected, but only after the kernel
	// has completed its handshake. In mode None the redirect may not be conntrack's
	// (Cilium's is eBPF). As for the guard, mangle comes before any ACCEPT of the filter
	// table; and no other program competes for the first place in INPUT of mangle, where
	// kubelet, kube-proxy and Calico all insert jumps first in INPUT of filter.
	// In mode EBPF nothing of conntrack tells a redirected connection from another.
	if mode != None && mode != EBPF {
		want = append(want, inputChain.with(
			fmt.Sprintf("! -i lo -p tcp -m tcp --dport %d -m conntrack ! --ctstate DNAT -j DROP", cfg.Port)))
	}
	// Forged packets from the metadata service to the node create conntrack entries for
	// connections that the node has not opened yet. The real replies to these are then
	// INVALID, and some nodes drop INVALID packets. raw comes before conntrack. A reverse
	// path lookup (rpfilter of iptables-extensions(8)) tells forged packets from real
	// ones, whatever the sysctl rp_filter.
	return append(want, antispoofChain.with(
		fmt.Sprintf("-s %s/32 -m rpfilter --invert -j DROP", cfg.Metadata.Addr())))
}

// state is the current state of a chain and of its hook, as iptables -S shows it.
type state struct {
	chain
	hookRules []string
	exists    bool // the chain; rules are its current ones
}

// jump is the only rule that may jump to the chain, and must be the first of its hook
// (but see anywhere).
func (c chain) jump() string { return "-A " + c.hook + " -j " + c.name }

// place says where the jump must be, for errors.
func (c chain) place() string {
	if c.anywhere {
		return fmt.Sprintf("in %s of the table %s", c.hook, c.table)
	}
	return fmt.Sprintf("first in %s of the table %s", c.hook, c.table)
}

// jumps lists the rules of the hook that jump to the chain, in whatever form, and whether
// jump is the only one and in its place. Rules before it that only drop do no harm and
// stay: AKS's IMDS restriction inserts such a rule first in FORWARD of mangle or filter
// each time the kubelet starts (AgentBaker's ensure_imds_restriction.sh).
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

// inEffect reports whether the chain has these rules and a jump, be it in its place or
// not.
func (s state) inEffect(rules []string) bool {
	return s.exists && slices.Equal(s.rules, rules) && slices.Contains(s.hookRules, s.jump())
}

// install returns the input of iptables-restore --noflush that gives the chain these
// rules in a single transaction, or "" if it has them. The contents of a chain of that
// name (of an old NMI) are replaced, and so are duplicate or misplaced jumps.
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

// remove returns the inputs that remove the jumps and the chain. The chain is deleted in
// a transaction of its own, which fails as long as a rule of another program refers to
// it.
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
