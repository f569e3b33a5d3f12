package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const (
	table = "nat"
	// Chain is ours alone. The name is that of the old NMI, so that its chain is
	// taken over, and tools that look for it go on working.
	Chain = "aad-metadata"
	hook  = "PREROUTING"
	jump  = "-A " + hook + " -j " + Chain
)

// desired is the content of our chain in one of the two modes, in the words of
// iptables -S. It is a value: equal configurations make equal rules.
func desired(cfg Config, mode Mode) []string {
	rule := fmt.Sprintf("-A %s -d %s/32 -p tcp -m tcp --dport %d ", Chain, cfg.Metadata.Addr(), cfg.Metadata.Port())
	if mode == DNAT {
		rule += "-j DNAT --to-destination " + netip.AddrPortFrom(cfg.Address, cfg.Port).String()
	} else {
		rule += fmt.Sprintf("-j REDIRECT --to-ports %d", cfg.Port)
	}
	return []string{rule}
}

// state is what iptables -S says of the two chains that concern us.
type state struct {
	hook   []string // of PREROUTING, policy line included
	chain  []string // of ours, without its -N line
	exists bool     // there is a chain of our name
}

// jumps lists the rules of the hook that lead into our chain, however they are
// written, and whether the hook starts with ours and has no other.
func (s state) jumps() (found []string, inPlace bool) {
	rules := slices.DeleteFunc(slices.Clone(s.hook), func(line string) bool { return !strings.HasPrefix(line, "-A ") })
	for _, rule := range rules {
		if strings.HasSuffix(rule, " -j "+Chain) || strings.Contains(rule, " -j "+Chain+" ") {
			found = append(found, rule)
		}
	}
	return found, len(found) == 1 && rules[0] == jump
}

// install returns the input of iptables-restore --noflush that turns the state
// into the desired one in a single transaction, or "" if it is that already.
// A chain that somebody else filled (an old NMI) is taken over; jumps that are
// doubled, or no longer first, are replaced by one in the first place.
func (s state) install(rules []string) string {
	found, inPlace := s.jumps()
	if inPlace && s.exists && slices.Equal(s.chain, rules) {
		return ""
	}
	lines := []string{
		"*" + table,
		":" + Chain + " - [0:0]", // makes the chain, or empties it
		"-F " + Chain,
	}
	lines = append(lines, rules...)
	lines = append(lines, deletions(found)...)
	lines = append(lines, "-I "+hook+" 1 -j "+Chain, "COMMIT", "")
	return strings.Join(lines, "\n")
}

// remove returns the inputs that leave nothing of ours there. The chain goes in a
// transaction of its own: it cannot while somebody else's rule leads to it.
func (s state) remove() []string {
	found, _ := s.jumps()
	if len(found) == 0 && !s.exists {
		return nil
	}
	lines := append([]string{"*" + table}, deletions(found)...)
	if !s.exists {
		return []string{strings.Join(append(lines, "COMMIT", ""), "\n")}
	}
	return []string{
		strings.Join(append(lines, "-F "+Chain, "COMMIT", ""), "\n"),
		strings.Join([]string{"*" + table, "-X " + Chain, "COMMIT", ""}, "\n"),
	}
}

func deletions(rules []string) []string {
	out := make([]string, len(rules))
	for i, rule := range rules {
		out[i] = "-D " + strings.TrimPrefix(rule, "-A ")
	}
	return out
}
