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
)

// tuple is one direction of a connection that the kernel tracks.
type tuple struct {
	protocol uint8
	src, dst netip.AddrPort
}

// bypassing picks out, of all the connections that the kernel tracks, those with the
// metadata service that the agent is not at the other end of. The nat table is asked
// for a connection's first packet alone, and so never for these. Without its entry
// the next packet counts as a first one, is redirected, and is answered with a reset,
// since the agent knows of no such connection (nf_conntrack_tcp_loose).
//
// There are two kinds: connections that a pod opened before the rules came, and those
// that seem to come from the metadata service. It opens none, so somebody forged a
// packet in order to have what is sent to it taken for an answer.
type bypassing struct {
	metadata netip.AddrPort
	local    map[netip.Addr]bool // the node's own addresses: its own connections are to bypass
}

func (b bypassing) match(orig, reply tuple) bool {
	if orig.protocol != unix.IPPROTO_TCP {
		return false
	}
	// Answers come from where the packets were sent to. One that leads to the
	// node itself leads to an agent, be it one that is handing over to this one; or
	// it is the node's own connection, of which an answer was seen first.
	if b.local[reply.src.Addr()] {
		return false
	}
	switch {
	case orig.dst == b.metadata:
		return !b.local[orig.src.Addr()]
	case orig.src == b.metadata, reply.dst == b.metadata:
		return true
	}
	return false
}

// cutBypassing deletes the entries that bypass the agent, and says how many.
func cutBypassing(metadata netip.AddrPort) (int, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return 0, fmt.Errorf("listing the node's addresses: %w", err)
	}
	b := bypassing{metadata: metadata, local: make(map[netip.Addr]bool)}
	for _, a := range addrs {
		if addr, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			b.local[addr] = true
		}
	}

	// A busy node tracks hundreds of thousands of connections, and a pod can make
	// it so: the table streams by, and only what matches is kept.
	var matching [][]byte
	list := conntrackRequest(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP)
	err = list.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(entry []byte) bool {
		if orig, reply, ok := parseEntry(entry); ok && b.match(orig, reply) {
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
			return i, fmt.Errorf("deleting a connection that bypasses the agent: %w", err)
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
	attrs := attributes(entry[nl.SizeofNfgenmsg:])
	orig, okOrig := parseTuple(attrs[nl.CTA_TUPLE_ORIG])
	reply, okReply := parseTuple(attrs[nl.CTA_TUPLE_REPLY])
	return orig, reply, okOrig && okReply
}

func parseTuple(b []byte) (tuple, bool) {
	parts := attributes(b)
	ip, proto := attributes(parts[nl.CTA_TUPLE_IP]), attributes(parts[nl.CTA_TUPLE_PROTO])
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

// maxAttribute is the highest type among the attributes that matter here.
const maxAttribute = 3

// attributes returns the values of netlink attributes by type. What cannot be
// read is left out.
func attributes(b []byte) (values [maxAttribute + 1][]byte) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		kind := binary.NativeEndian.Uint16(b[2:]) & nl.NLA_TYPE_MASK
		if size < unix.SizeofNlAttr || size > len(b) {
			break
		}
		if kind <= maxAttribute {
			values[kind] = b[unix.SizeofNlAttr:size]
		}
		b = b[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return values
}
