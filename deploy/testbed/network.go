package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the testbed.
const (
	NodeAddress     = "10.0.0.4"           // of the node's uplink
	MetadataAddress = "169.254.169.254:80" // of the metadata service

	gateway    = "10.0.0.1" // the machine that the metadata service is on
	podNetwork = "10.244.0.0/16"
	ptpHop     = "10.244.0.1"  // host end of every ptp pod's link
	routedHop  = "169.254.1.1" // gateway that routed pods are told, as by Calico
)

// Shape is how a pod is connected to its node.
type Shape string

const (
	// Ptp gives the host end of the pod's link an address (the ptp and bridge
	// plugins, kubenet): REDIRECT works.
	Ptp Shape = "ptp"
	// Routed gives it none (Azure CNI transparent, Calico): REDIRECT drops.
	Routed Shape = "routed"
)

// Network is the node's network: an uplink, and the machine behind it that the
// metadata service runs on. Pods are added to it.
type Network struct {
	Metadata *Namespace // where the metadata service is
	pods     int
}

// NewNetwork connects the process's namespace, which must be that of EnterNode,
// to a new one for the metadata service. As on a real node, what a pod sends to
// the metadata service is forwarded to it unless somebody stops it.
func NewNetwork() (*Network, error) {
	imds, err := NewNamespace()
	if err != nil {
		return nil, err
	}
	n := &Network{Metadata: imds}
	if err := n.connect(); err != nil {
		return nil, errors.Join(err, imds.Close())
	}
	return n, nil
}

func (n *Network) connect() error {
	if err := sysctl("ipv4.ip_forward", "1"); err != nil {
		return err
	}
	eth0, err := link("eth0", n.Metadata)
	if err != nil {
		return err
	}
	if err = errors.Join(
		addAddress(eth0, NodeAddress+"/24"),
		addRoute(eth0, "0.0.0.0/0", gateway),
	); err != nil {
		return err
	}
	err = n.Metadata.Do(func() error {
		far, err := netlink.LinkByName(peerName)
		if err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.LinkSetUp(far),
			addAddress(far, gateway+"/24"),
			addAddress(lo, "169.254.169.254/32"),
			addRoute(far, podNetwork, NodeAddress),
			awaitUp(peerName),
		)
	})
	return errors.Join(err, awaitUp("eth0"))
}

// Close takes the network down.
func (n *Network) Close() error {
	return errors.Join(deleteLink("eth0"), n.Metadata.Close())
}

// Pod is a pod's namespace.
type Pod struct {
	*Namespace
	Addr netip.Addr
	link string // host end
}

// AddPod connects a new namespace with the given address to the node.
func (n *Network) AddPod(addr string, shape Shape) (*Pod, error) {
	ip, err := netip.ParseAddr(addr)
	if err != nil {
		return nil, err
	}
	ns, err := NewNamespace()
	if err != nil {
		return nil, err
	}
	n.pods++
	p := &Pod{Namespace: ns, Addr: ip, link: fmt.Sprintf("veth%d", n.pods)}
	if err := p.connect(shape); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pod) connect(shape Shape) error {
	host, err := link(p.link, p.Namespace)
	if err != nil {
		return err
	}
	hop := routedHop
	if shape == Ptp {
		hop = ptpHop
		err = addAddress(host, hop+"/32")
	} else {
		err = errors.Join(
			sysctl("ipv4.conf."+p.link+".proxy_arp", "1"),
			sysctl("ipv4.neigh."+p.link+".proxy_delay", "0"), // up to 0.8 s otherwise
		)
	}
	if err = errors.Join(err, addRoute(host, p.Addr.String()+"/32", "")); err != nil {
		return err
	}
	err = p.Do(func() error {
		eth0, err := netlink.LinkByName(peerName)
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.LinkSetUp(eth0),
			addAddress(eth0, p.Addr.String()+"/32"),
			addRoute(eth0, hop+"/32", ""),
			addRoute(eth0, "0.0.0.0/0", hop),
			awaitUp(peerName),
		)
	})
	return errors.Join(err, awaitUp(p.link))
}

// Close takes the pod off the node.
func (p *Pod) Close() error {
	return errors.Join(deleteLink(p.link), p.Namespace.Close())
}

// peerName is the name of every link's far end, inside its namespace.
const peerName = "eth0"

// link makes a veth pair from here to the namespace, and brings this end up.
func link(name string, to *Namespace) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peerName, PeerNamespace: netlink.NsFd(to.handle)})
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
	return poll(context.Background(), 5*time.Second, name+" to carry packets", func() error {
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
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return err
	}
	route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}
	if via == "" {
		route.Scope = unix.RT_SCOPE_LINK
	} else {
		route.Gw = net.ParseIP(via)
	}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("route to %s over %s: %w", to, l.Attrs().Name, err)
	}
	return nil
}
