package iptables

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// loAddress returns lo, and the address as it is added there: one host, of scope host.
func loAddress(addr netip.Addr) (netlink.Link, *netlink.Addr, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, nil, fmt.Errorf("finding lo: %w", err)
	}
	a, err := netlink.ParseAddr(netip.PrefixFrom(addr, addr.BitLen()).String())
	if err != nil {
		return nil, nil, fmt.Errorf("address %s: %w", addr, err)
	}
	a.Scope = unix.RT_SCOPE_HOST
	return lo, a, nil
}

// ensureAddress adds the address to lo if it is missing.
func ensureAddress(addr netip.Addr) error {
	lo, a, err := loAddress(addr)
	if err != nil {
		return err
	}
	if err = netlink.AddrAdd(lo, a); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to lo: %w", addr, err)
	}
	return nil
}

// removeAddress removes the address from lo, and reports whether it was there.
func removeAddress(addr netip.Addr) (bool, error) {
	lo, a, err := loAddress(addr)
	if err != nil {
		return false, err
	}
	err = netlink.AddrDel(lo, a)
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return false, fmt.Errorf("removing %s from lo: %w", addr, err)
	}
	return err == nil, nil
}
