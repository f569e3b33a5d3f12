package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addressLabel marks an address on lo as the agent's (IFA_LABEL; ip-address(8) demands that it
// begins with the interface's name), so that cleanup finds it whatever Config.Address was.
const addressLabel = "lo:nmi"

func findLo() (netlink.Link, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("finding lo: %w", err)
	}
	return lo, nil
}

// ensureAddress adds the address to lo, as that of one host and of scope host, unless the node has it.
// It must be link-local then: another might be that of another machine, which the node would no
// longer reach.
func ensureAddress(addr netip.Addr) error {
	all, err := netlink.AddrList(nil, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("listing the node's addresses: %w", err)
	}
	if slices.ContainsFunc(all, func(a netlink.Addr) bool { return a.IP.Equal(addr.AsSlice()) }) {
		return nil
	}
	if !addr.IsLinkLocalUnicast() {
		return fmt.Errorf("--redirect-address=%s is no address of this node: give one that the node has, or a link-local one (169.254.0.0/16), which the agent adds to lo", addr)
	}
	lo, err := findLo()
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(netip.PrefixFrom(addr, addr.BitLen()).String())
	if err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	a.Scope, a.Label = unix.RT_SCOPE_HOST, addressLabel
	if err = netlink.AddrAdd(lo, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to lo: %w", addr, err)
	}
	return nil
}

// removeAddresses removes the agent's addresses from lo, and reports whether there were any: those
// with its label, and the given one, which earlier builds added without a label.
func removeAddresses(unlabelled netip.Addr) (removed bool, err error) {
	lo, err := findLo()
	if err != nil {
		return false, err
	}
	addresses, err := netlink.AddrList(lo, unix.AF_INET)
	if err != nil {
		return false, fmt.Errorf("listing the addresses of lo: %w", err)
	}
	var all error
	for _, a := range addresses {
		if ip, _ := netip.AddrFromSlice(a.IP.To4()); a.Label != addressLabel && ip != unlabelled {
			continue
		}
		removed = true
		if err := netlink.AddrDel(lo, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			all = errors.Join(all, fmt.Errorf("removing %s from lo: %w", a.IP, err))
		}
	}
	return removed, all
}
