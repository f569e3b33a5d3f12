package iptables

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Earlier lists other programs' rules that see pods' packets to the metadata service before
// the redirect does, and may send them elsewhere or drop them:
//
//   - rules in raw and mangle, and in nat of the other backend, that name its address;
//   - tables of nftables that name it, with a chain in prerouting that comes before nat's;
//   - policy routing rules that precede the fence's.
func (i *Inspector) Earlier() (found []string, err error) {
	hooks := []string{"INPUT", "FORWARD", "OUTPUT", "POSTROUTING"} // that come later, or see the node's own packets
	found, err = i.foreignRules([]string{"raw", "mangle"}, func(chain, _ string) bool { return !slices.Contains(hooks, chain) })
	if err != nil {
		return nil, err
	}
	nat, err := i.foreignRules([]string{"nat"}, func(chain, _ string) bool { return !slices.Contains(hooks, chain) })
	if err != nil {
		return nil, err
	}
	other := fmt.Sprintf("iptables-%s ", i.Backend.other())
	found = append(found, slices.DeleteFunc(nat, func(rule string) bool { return !strings.HasPrefix(rule, other) })...)
	tables, err := earlierTables(i.cfg.Metadata.Addr())
	if err != nil {
		return nil, err
	}
	found = append(found, tables...)
	routing, err := listRoutingRules()
	if err != nil {
		return nil, err
	}
	for _, rule := range precedingRules(routing, i.cfg.Metadata.Addr()) {
		found = append(found, "ip rule "+rule)
	}
	return found, nil
}

// natPriority is the priority of PREROUTING of nat (NF_IP_PRI_NAT_DST of
// linux/netfilter_ipv4.h). Of two chains with one priority, the one that was made first runs
// first.
const natPriority = -100

// Attributes of linux/netfilter/nf_tables.h.
const (
	nftTableName   = 1  // NFTA_TABLE_NAME
	nftChainTable  = 1  // NFTA_CHAIN_TABLE
	nftChainName   = 3  // NFTA_CHAIN_NAME
	nftChainHook   = 4  // NFTA_CHAIN_HOOK
	nftChainType   = 7  // NFTA_CHAIN_TYPE
	nftHookNum     = 1  // NFTA_HOOK_HOOKNUM
	nftHookPrio    = 2  // NFTA_HOOK_PRIORITY
	nftRuleTable   = 1  // NFTA_RULE_TABLE
	nftSetTable    = 1  // NFTA_SET_TABLE
	nftSetName     = 2  // NFTA_SET_NAME
	nftElemTable   = 1  // NFTA_SET_ELEM_LIST_TABLE
	nftElemSet     = 2  // NFTA_SET_ELEM_LIST_SET
	nftDataValue   = 1  // NFTA_DATA_VALUE
	nftGetTable    = 1  // NFT_MSG_GETTABLE
	nftGetChain    = 4  // NFT_MSG_GETCHAIN
	nftGetRule     = 7  // NFT_MSG_GETRULE
	nftGetSet      = 10 // NFT_MSG_GETSET
	nftGetElement  = 13 // NFT_MSG_GETSETELEM
	nftSubsystem   = 10 // NFNL_SUBSYS_NFTABLES of linux/netfilter/nfnetlink.h
	nftGenMsg      = 4  // length of struct nfgenmsg there
	hookPrerouting = 0  // NF_INET_PRE_ROUTING
)

// nftChain is a base chain of nftables.
type nftChain struct {
	family      uint8
	table, name string
	hook        uint32
	priority    int32
	kind        string // "filter", "nat" or "route"
}

func (c nftChain) String() string {
	family := map[uint8]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip"}[c.family]
	return fmt.Sprintf("nftables table %s %s (chain %s, type %s, priority %d)", family, c.table, c.name, c.kind, c.priority)
}

// early reports whether a chain sees pods' packets before the redirect, or may.
func (c nftChain) early() bool {
	ours := c.family == unix.NFPROTO_IPV4 && slices.Contains([]string{"raw", "mangle", "nat"}, c.table) // the commands of iptables show these
	ip := c.family == unix.NFPROTO_INET || c.family == unix.NFPROTO_IPV4
	return ip && !ours && c.hook == hookPrerouting && (c.priority < natPriority || c.priority == natPriority && c.kind == "nat")
}

// earlierTables lists the base chains that come before the redirect, of tables that name the
// metadata service's address in a rule or a set. Rules for all addresses, such as
// kube-proxy's, are not among them.
func earlierTables(metadata netip.Addr) (found []string, err error) {
	chains, err := listNFT(nftGetChain, unix.NFPROTO_UNSPEC)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil, nil // the kernel has no nftables
	}
	if err != nil {
		return nil, err
	}
	for _, message := range chains {
		chain, ok := parseNFTChain(message)
		if !ok || !chain.early() {
			continue
		}
		switch named, err := tableNames(chain.family, chain.table, metadata); {
		case err != nil:
			return nil, err
		case named:
			found = append(found, chain.String())
		}
	}
	return found, nil
}

// tableNames reports whether a rule or a set of a table names an address.
func tableNames(family uint8, table string, addr netip.Addr) (bool, error) {
	rules, err := listNFT(nftGetRule, family, nl.NewRtAttr(nftRuleTable, nl.ZeroTerminated(table)))
	if err != nil {
		return false, err
	}
	values := nftValues(addr)
	for _, rule := range rules {
		if slices.ContainsFunc(values, func(value []byte) bool { return bytes.Contains(rule, value) }) {
			return true, nil
		}
	}
	sets, err := listNFT(nftGetSet, family, nl.NewRtAttr(nftSetTable, nl.ZeroTerminated(table)))
	if err != nil {
		return false, err
	}
	for _, set := range sets {
		name := nftText(set, nftSetName)
		elements, err := listNFT(nftGetElement, family, nl.NewRtAttr(nftElemTable, nl.ZeroTerminated(table)), nl.NewRtAttr(nftElemSet, nl.ZeroTerminated(name)))
		if err != nil {
			return false, err
		}
		for _, element := range elements {
			if bytes.Contains(element, addr.AsSlice()) {
				return true, nil
			}
		}
	}
	return false, nil
}

// nftValues returns the values by which rules match an IPv4 address: the address itself, and
// the network of 16 bits that it is in, which nft compares by its first two bytes alone or by a
// mask.
func nftValues(addr netip.Addr) [][]byte {
	network, _ := addr.Prefix(16)
	var values [][]byte
	for _, value := range [][]byte{addr.AsSlice(), network.Masked().Addr().AsSlice(), addr.AsSlice()[:2]} {
		values = append(values, nl.NewRtAttr(nftDataValue, value).Serialize())
	}
	return values
}

// listNFT lists the objects of nftables of a kind and family.
func listNFT(kind int, family uint8, filter ...*nl.RtAttr) ([][]byte, error) {
	const attempts = 5
	for range attempts {
		req := nl.NewNetlinkRequest(nftSubsystem<<8|kind, unix.NLM_F_DUMP)
		req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0})
		for _, attribute := range filter {
			req.AddData(attribute)
		}
		messages, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		switch {
		case errors.Is(err, netlink.ErrDumpInterrupted), errors.Is(err, unix.EINTR):
			continue // the ruleset changed meanwhile
		case errors.Is(err, unix.ENOENT): // the table has gone
			return nil, nil
		case err != nil:
			return nil, fmt.Errorf("listing the tables of nftables: %w", explainErrno(err))
		}
		return messages, nil
	}
	return nil, errors.New("listing the tables of nftables: they keep changing")
}

// parseNFTChain parses a base chain (NFT_MSG_NEWCHAIN). Another chain has no hook.
func parseNFTChain(message []byte) (c nftChain, ok bool) {
	if len(message) < nftGenMsg {
		return nftChain{}, false
	}
	attrs, err := nl.ParseRouteAttr(message[nftGenMsg:])
	if err != nil {
		return nftChain{}, false
	}
	c = nftChain{family: message[0], table: nftText(message, nftChainTable), name: nftText(message, nftChainName), kind: nftText(message, nftChainType)}
	for _, a := range attrs {
		if a.Attr.Type&nl.NLA_TYPE_MASK != nftChainHook {
			continue
		}
		hook, err := nl.ParseRouteAttr(a.Value)
		if err != nil {
			return nftChain{}, false
		}
		for _, h := range hook {
			if len(h.Value) < 4 {
				continue
			}
			switch number := binary.BigEndian.Uint32(h.Value); h.Attr.Type & nl.NLA_TYPE_MASK {
			case nftHookNum:
				c.hook, ok = number, true
			case nftHookPrio:
				c.priority = int32(number) //nolint:gosec // it is signed there
			}
		}
	}
	return c, ok
}

// nftText returns an attribute of a message as text.
func nftText(message []byte, kind uint16) string {
	if len(message) < nftGenMsg {
		return ""
	}
	attrs, _ := nl.ParseRouteAttr(message[nftGenMsg:])
	for _, a := range attrs {
		if a.Attr.Type&nl.NLA_TYPE_MASK == kind {
			return strings.TrimRight(string(a.Value), "\x00")
		}
	}
	return ""
}
