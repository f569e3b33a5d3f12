package testbed

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AddLink makes a veth pair from here to a namespace, with one name at both ends, and
// brings this end up. Index 0 leaves its index to the kernel.
func AddLink(name string, index int, to *Namespace) (netlink.Link, error) {
	return link(name, name, index, to)
}

// AddCiliumHost makes the veth pair that Cilium has on every node. Both ends are the
// node's.
func AddCiliumHost() (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cilium_host"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "cilium_net"}); err != nil {
		return nil, fmt.Errorf("making cilium_host: %w", err)
	}
	return netlink.LinkByName(attrs.Name)
}

func link(name, peer string, index int, to *Namespace) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, index
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(to.handle)})
	if err != nil {
		return nil, fmt.Errorf("making the link %s: %w", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("finding the link %s: %w", name, err)
	}
	return l, netlink.LinkSetUp(l)
}

// awaitUp waits until the kernel carries packets over a link whose ends are both
// up: it says so up to a second later (net/core/link_watch.c), and drops packets
// until then.
func awaitUp(name string) error {
	return poll(context.Background(), 30*time.Second, name+" to carry packets", func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if state := l.Attrs().OperState; state != netlink.OperUp {
			return fmt.Errorf("it is %s", state)
		}
		return nil
	})
}

func deleteLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding the link %s: %w", name, err)
	}
	return netlink.LinkDel(l)
}

func addAddress(l netlink.Link, address string) error {
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("address %s on %s: %w", address, l.Attrs().Name, err)
	}
	return nil
}

// addRoute adds a route over the link, to be reached directly when via is "".
func addRoute(l netlink.Link, to, via string) error {
	r, err := route(l, to, via)
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(r); err != nil {
		return fmt.Errorf("route to %s over %s: %w", to, l.Attrs().Name, err)
	}
	return nil
}

// setRoute makes the link of that name the way to a destination, whatever was
// the way before.
func setRoute(name, to, via string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding the link %s: %w", name, err)
	}
	r, err := route(l, to, via)
	if err != nil {
		return err
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("moving the route to %s to %s: %w", to, name, err)
	}
	return nil
}

func route(l netlink.Link, to, via string) (*netlink.Route, error) {
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return nil, err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}
	if via == "" {
		r.Scope = unix.RT_SCOPE_LINK
	} else {
		r.Gw = net.ParseIP(via)
	}
	return r, nil
}
