package iptables

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bypassing matches the kernel's memory of connections to the metadata service
// that do not lead to the agent. The nat table is asked for a connection's first
// packet alone, so one that was open before the rules came would go on to the
// metadata service for as long as both ends like. Without its entry the next
// packet counts as a first one, is redirected, and is answered with a reset,
// since the agent knows of no such connection (nf_conntrack_tcp_loose).
type bypassing struct {
	metadata netip.AddrPort
	port     uint16              // the agent's
	local    map[netip.Addr]bool // the node's own addresses: its own connections are to bypass
}

// MatchConntrackFlow reports whether the entry is one to delete.
func (b bypassing) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	f := flow.Forward
	if f.Protocol != unix.IPPROTO_TCP || address(f.DstIP) != b.metadata.Addr() || f.DstPort != b.metadata.Port() {
		return false
	}
	// Answers come from where the packets were sent to.
	led := netip.AddrPortFrom(address(flow.Reverse.SrcIP), flow.Reverse.SrcPort)
	toAgent := led.Port() == b.port && b.local[led.Addr()]
	return !toAgent && !b.local[address(f.SrcIP)]
}

func address(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip) // the zero Addr, which equals none, for what is no address
	return addr.Unmap()
}

// cutBypassing deletes the entries that bypass the agent, and says how many.
func cutBypassing(metadata netip.AddrPort, port uint16) (uint, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return 0, fmt.Errorf("listing the node's addresses: %w", err)
	}
	b := bypassing{metadata: metadata, port: port, local: make(map[netip.Addr]bool)}
	for _, a := range addrs {
		b.local[address(a.IP)] = true
	}
	n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, b)
	if err != nil {
		return n, fmt.Errorf("deleting connections that bypass the agent: %w", err)
	}
	return n, nil
}
