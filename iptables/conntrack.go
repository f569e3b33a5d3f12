package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/links"
)

// tuple is one direction of a connection that the kernel tracks.
type tuple struct {
	protocol uint8
	src, dst netip.AddrPort
}

// staleFlows matches tracked connections to the metadata service that bypass the agent:
// the nat table sees only the first packet of a connection, and so never theirs. Without
// its conntrack entry the next packet counts as the first one, is redirected, and is
// answered with a reset, since the agent has no such connection
// (nf_conntrack_tcp_loose).
//
// There are two kinds: connections that a pod opened before the rules were in place, and
// connections that claim to come from the metadata service. It opens none: their first
// packet was forged, so that packets to it count as replies.
type staleFlows struct {
	metadata netip.AddrPort
	local    map[netip.Addr]bool // the node's addresses: its own connections are legitimate
}

func (f staleFlows) match(orig, reply tuple) bool {
	if orig.protocol != unix.IPPROTO_TCP {
		return false
	}
	// Replies come from where the packets are delivered. If that is the node itself, it
	// is an agent, perhaps one that is handing over to this one; or it is the node's own
	// connection, of which conntrack saw a reply first.
	if f.local[reply.src.Addr()] {
		return false
	}
	switch {
	case orig.dst == f.metadata:
		return !f.local[orig.src.Addr()]
	case orig.src == f.metadata, reply.dst == f.metadata:
		return true
	}
	return false
}

// flushStaleFlows deletes the conntrack entries of stale flows, and returns how many.
func flushStaleFlows(metadata netip.AddrPort) (int, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return 0, fmt.Errorf("listing the node's addresses: %w", err)
	}
	stale := staleFlows{metadata: metadata, local: make(map[netip.Addr]bool)}
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			stale.local[addr] = true
		}
	}

	// A node can track hundreds of thousands of connections, if only because of one pod:
	// entries are streamed, and only matching ones kept.
	var matching [][]byte
	list := conntrackRequest(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
	err = list.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(entry []byte) bool {
		if orig, reply, ok := parseEntry(entry); ok && stale.match(orig, reply) {
			matching = append(matching, slices.Clone(entry))
		}
		return true
	})
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, fmt.Errorf("listing tracked connections: %w", err)
	}
	for i, entry := range matching {
		del := conntrackRequest(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
		del.AddRawData(entry[nl.SizeofNfgenmsg:])
		if _, err := del.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return i, fmt.Errorf("deleting the conntrack entry of a connection that bypasses the agent: %w", err)
		}
	}
	return len(matching), nil
}

func conntrackRequest(operation, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(int(netlink.ConntrackTable)<<8|operation, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	return req
}

// parseEntry reads both directions of an entry: attributes CTA_TUPLE_ORIG and
// CTA_TUPLE_REPLY behind an nfgenmsg (linux/netfilter/nfnetlink_conntrack.h).
func parseEntry(entry []byte) (orig, reply tuple, ok bool) {
	if len(entry) < nl.SizeofNfgenmsg {
		return tuple{}, tuple{}, false
	}
	attrs := attributesByType(entry[nl.SizeofNfgenmsg:])
	orig, okOrig := parseTuple(attrs[nl.CTA_TUPLE_ORIG])
	reply, okReply := parseTuple(attrs[nl.CTA_TUPLE_REPLY])
	return orig, reply, okOrig && okReply
}

func parseTuple(b []byte) (tuple, bool) {
	parts := attributesByType(b)
	ip, proto := attributesByType(parts[nl.CTA_TUPLE_IP]), attributesByType(parts[nl.CTA_TUPLE_PROTO])
	src, okSrc := netip.AddrFromSlice(ip[nl.CTA_IP_V4_SRC])
	dst, okDst := netip.AddrFromSlice(ip[nl.CTA_IP_V4_DST])
	number, srcPort, dstPort := proto[nl.CTA_PROTO_NUM], proto[nl.CTA_PROTO_SRC_PORT], proto[nl.CTA_PROTO_DST_PORT]
	if !okSrc || !okDst || len(number) != 1 || len(srcPort) != 2 || len(dstPort) != 2 {
		return tuple{}, false // a protocol without ports
	}
	return tuple{
		protocol: number[0],
		src:      netip.AddrPortFrom(src, binary.BigEndian.Uint16(srcPort)),
		dst:      netip.AddrPortFrom(dst, binary.BigEndian.Uint16(dstPort)),
	}, true
}

// maxAttribute is the highest attribute type that is used here.
const maxAttribute = 3

// attributesByType returns the values of netlink attributes.
func attributesByType(b []byte) (values [maxAttribute + 1][]byte) {
	for kind, value := range links.Attributes(b) {
		if kind <= maxAttribute {
			values[kind] = value
		}
	}
	return values
}
