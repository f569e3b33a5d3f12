package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The routing fence is three policy routing rules (ip-rule(8)), written through netlink,
// so that it works where the node forbids iptables:
//
//	10: from all to METADATA iif lo goto 12
//	11: from all to METADATA prohibit
//	12: from all nop
//
// The kernel looks up routes for the node's own packets with the input interface lo
// (flowi4_iif, LOOPBACK_IFINDEX): they skip the prohibit rule. The same goes for the
// lookup of the source of a received packet (__fib_validate_source), so that replies of
// the metadata service to the node pass rp_filter and rpfilter. All other packets to the
// metadata service are being forwarded, and get "administratively prohibited".
//
// CNI plugins leave these preferences free: Cilium uses 9, 10 and 100, AWS 512 and above.
// Sharing one does no harm.
const (
	prefNode   = 10
	prefOthers = 11
	prefEnd    = 12
)

// routingRule is a policy routing rule, as far as it matters here (struct fib_rule_hdr
// and the FRA_ attributes of linux/fib_rules.h). It is comparable.
type routingRule struct {
	pref   uint32
	action uint8        // nl.FR_ACT_*
	dst    netip.Prefix // zero for all
	iif    string
	target uint32 // of nl.FR_ACT_GOTO

	// Of other programs' rules; all zero in own ones.
	src      netip.Prefix
	table    uint32
	selected bool // by a mark, an output interface, a port and so on
}

// routingRules returns the fence's rules in the order to write them in: a goto without
// its target is skipped, and the node's own packets would be refused.
func routingRules(metadata netip.Addr) []routingRule {
	dst := netip.PrefixFrom(metadata, metadata.BitLen())
	return []routingRule{
		{pref: prefEnd, action: nl.FR_ACT_NOP},
		{pref: prefNode, action: nl.FR_ACT_GOTO, dst: dst, iif: "lo", target: prefEnd},
		{pref: prefOthers, action: nl.FR_ACT_PROHIBIT, dst: dst},
	}
}

// RoutingFence returns the routing fence as commands of ip(8), in the order to run them
// in. A command whose rule exists already fails and changes nothing: fib_nl_newrule of
// the kernel compares the whole rule.
func RoutingFence(metadata netip.Addr) (commands []string) {
	for _, r := range routingRules(metadata) {
		commands = append(commands, fmt.Sprintf("ip -4 rule add pref %d %s protocol kernel", r.pref, r.spec()))
	}
	return commands
}

// isOwn reports whether a rule is one of the fence's, for any metadata address.
func (r routingRule) isOwn() bool {
	return slices.Contains(routingRules(r.dst.Addr()), r) || r == routingRules(netip.IPv4Unspecified())[0]
}

// ensureRoutingFence adds missing rules and deletes those for another metadata address.
// intact is whether none was missing. notes name other programs' rules that come first
// and may route pods' packets past the fence.
func ensureRoutingFence(metadata netip.Addr) (intact, changed bool, notes []string, err error) {
	rules, err := listRoutingRules()
	if err != nil {
		return false, false, nil, err
	}
	desired := routingRules(metadata)
	added, err := addMissing(desired, rules)
	if err != nil {
		return false, added, nil, err
	}
	stale := slices.DeleteFunc(slices.Clone(rules), func(r routingRule) bool {
		return !r.isOwn() || slices.Contains(desired, r)
	})
	if err := deleteRoutingRules(stale); err != nil {
		return !added, true, nil, err
	}
	if preceding := precedingRules(rules, metadata); len(preceding) > 0 {
		notes = []string{"policy routing rules of another program precede the fence's and may route pods' packets to the metadata service past it; only the guard chain drops them then: " + strings.Join(preceding, "; ")}
	}
	return !added, added || len(stale) > 0, notes, nil
}

// addRoutingFence adds missing rules and deletes none, and reports whether any was
// missing.
func addRoutingFence(metadata netip.Addr) (added bool, err error) {
	rules, err := listRoutingRules()
	if err != nil {
		return false, err
	}
	return addMissing(routingRules(metadata), rules)
}

// addMissing adds the desired rules that are not among rules, and reports whether any was
// missing.
func addMissing(desired, rules []routingRule) (added bool, err error) {
	for _, rule := range desired {
		if slices.Contains(rules, rule) {
			continue
		}
		added = true
		if err := rule.add(); err != nil {
			return true, err
		}
	}
	return added, nil
}

// removeRoutingFence deletes the fence's rules, for any metadata address, and reports
// whether there were any.
func removeRoutingFence() (removed bool, err error) {
	rules, err := listRoutingRules()
	if err != nil {
		return false, err
	}
	rules = slices.DeleteFunc(rules, func(r routingRule) bool { return !r.isOwn() })
	return len(rules) > 0, deleteRoutingRules(rules)
}

// deleteRoutingRules deletes own rules, prohibit first: without the goto it would refuse
// the node's own packets.
func deleteRoutingRules(rules []routingRule) error {
	for _, action := range []uint8{nl.FR_ACT_PROHIBIT, nl.FR_ACT_GOTO, nl.FR_ACT_NOP} {
		for _, rule := range rules {
			if rule.action != action {
				continue
			}
			if err := netlink.RuleDel(rule.message()); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("deleting the routing rule %q: %w", rule, explainErrno(err))
			}
		}
	}
	return nil
}

func (r routingRule) add() error {
	if err := netlink.RuleAdd(r.message()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding the routing rule %q: %w", r, explainErrno(err))
	}
	return nil
}

// message returns an own rule for netlink. Its protocol is the kernel's:
// systemd-networkd deletes rules of other protocols when it starts
// (ManageForeignRoutingPolicyRules of networkd.conf(5)).
func (r routingRule) message() *netlink.Rule {
	m := netlink.NewRule()
	m.Family, m.Priority, m.Type, m.IifName, m.Protocol = unix.AF_INET, int(r.pref), r.action, r.iif, unix.RTPROT_KERNEL
	if r.dst.IsValid() {
		m.Dst = &net.IPNet{IP: r.dst.Addr().AsSlice(), Mask: net.CIDRMask(r.dst.Bits(), r.dst.Addr().BitLen())}
	}
	if r.action == nl.FR_ACT_GOTO {
		m.Goto = int(r.target)
	}
	return m
}

// String formats the rule much as ip-rule(8) does.
func (r routingRule) String() string { return fmt.Sprintf("%d: %s", r.pref, r.spec()) }

// spec formats selector and action in the syntax of ip-rule(8).
func (r routingRule) spec() string {
	var words []string
	if r.src.IsValid() {
		words = append(words, "from", r.src.String())
	}
	if r.dst.IsValid() {
		words = append(words, "to", r.dst.String())
	}
	if r.iif != "" {
		words = append(words, "iif", r.iif)
	}
	switch r.action {
	case nl.FR_ACT_TO_TBL:
		words = append(words, fmt.Sprintf("lookup %d", r.table))
	case nl.FR_ACT_GOTO:
		words = append(words, fmt.Sprintf("goto %d", r.target))
	case nl.FR_ACT_NOP:
		words = append(words, "nop")
	case nl.FR_ACT_PROHIBIT:
		words = append(words, "prohibit")
	default:
		words = append(words, fmt.Sprintf("action %d", r.action))
	}
	return strings.Join(words, " ")
}

// precedingRules lists other programs' rules before the fence that can match pods'
// packets to the metadata service. Rules that match a mark or the like are left out:
// which packets have it is unknown.
func precedingRules(rules []routingRule, metadata netip.Addr) (found []string) {
	for _, r := range rules {
		switch {
		case r.pref > prefOthers:
			return found
		case r.isOwn(), r.selected, r.iif == "lo", r.table == unix.RT_TABLE_LOCAL:
		case r.dst.IsValid() && !r.dst.Contains(metadata):
		case r.action == nl.FR_ACT_TO_TBL, r.action == nl.FR_ACT_GOTO && r.target > prefOthers:
			found = append(found, r.String())
		}
	}
	return found
}

// listRoutingRules returns the node's IPv4 rules in the kernel's order.
// (netlink.RuleList does not return a rule's action.)
func listRoutingRules() ([]routingRule, error) {
	const attempts = 5
	for range attempts {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(unix.AF_INET))
		messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue // the rules changed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("listing the routing rules: %w", explainErrno(err))
		}
		rules := make([]routingRule, 0, len(messages))
		for _, m := range messages {
			if rule, ok := parseRoutingRule(m); ok {
				rules = append(rules, rule)
			}
		}
		return rules, nil
	}
	return nil, errors.New("listing the routing rules: they keep changing")
}

// neutral are the attributes of linux/fib_rules.h that match no packets.
var neutral = []uint16{nl.FRA_TABLE, nl.FRA_SUPPRESS_PREFIXLEN, nl.FRA_SUPPRESS_IFGROUP, nl.FRA_FLOW, nl.FRA_PROTOCOL, fraPad}

const (
	fraPad     = 18  // FRA_PAD
	ruleInvert = 0x2 // FIB_RULE_INVERT
)

func parseRoutingRule(m []byte) (rule routingRule, ok bool) {
	if len(m) < unix.SizeofRtMsg {
		return routingRule{}, false
	}
	hdr := nl.DeserializeRtMsg(m)
	rule = routingRule{action: hdr.Type, table: uint32(hdr.Table), selected: hdr.Tos != 0 || hdr.Flags&ruleInvert != 0}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofRtMsg:])
	if err != nil {
		return routingRule{}, false
	}
	for _, a := range attrs {
		number := func() (n uint32) {
			if len(a.Value) >= 4 {
				n = binary.NativeEndian.Uint32(a.Value)
			}
			return n
		}
		switch kind := a.Attr.Type; {
		case kind == nl.FRA_PRIORITY:
			rule.pref = number()
		case kind == nl.FRA_GOTO:
			rule.target = number()
		case kind == nl.FRA_DST:
			rule.dst = prefix(a.Value, hdr.Dst_len)
		case kind == nl.FRA_SRC:
			rule.src = prefix(a.Value, hdr.Src_len)
		case kind == nl.FRA_IIFNAME:
			rule.iif = strings.TrimRight(string(a.Value), "\x00")
		case kind == nl.FRA_TABLE:
			rule.table = number()
		case !slices.Contains(neutral, kind):
			rule.selected = true
		}
	}
	return rule, true
}

func prefix(addr []byte, bits uint8) netip.Prefix {
	a, _ := netip.AddrFromSlice(addr)
	return netip.PrefixFrom(a, int(bits))
}
