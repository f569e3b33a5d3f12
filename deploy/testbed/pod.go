package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"time"

	"github.com/vishvananda/netlink"
)

// Shape is how a pod is connected to its node.
type Shape string

const (
	// Ptp gives the host end of the pod's link an address (the ptp plugin):
	// REDIRECT works.
	Ptp Shape = "ptp"
	// Routed gives it none (Azure CNI transparent, Calico): REDIRECT drops.
	Routed Shape = "routed"
	// Bridge makes it a port of BridgeName, which has the address (kubenet, the
	// bridge plugin): REDIRECT works, and the pods share a wire, so that one can
	// pretend to be another.
	Bridge Shape = "bridge"
)

// BridgeName is the bridge that all pods of shape Bridge are on. It comes with
// the first of them and goes with the last.
const BridgeName = "cbr0"

// PodLink is the name of a pod's link inside the pod.
const PodLink = "eth0"

const (
	firstHop  = "10.244.0.1"  // of ptp pods and of those on the bridge
	routedHop = "169.254.1.1" // that routed pods are told, as by Calico
)

// Pod is a pod's namespace.
type Pod struct {
	*Namespace
	Addr netip.Addr
	Link string // the link's name on the node; PodLink inside

	network   *Network
	shape     Shape
	container *Container
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
	p := &Pod{Namespace: ns, Addr: ip, Link: fmt.Sprintf("veth%d", n.pods), network: n, shape: shape}
	if err := p.connect(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Pod) connect() error {
	if p.shape == Bridge {
		if err := p.network.joinBridge(); err != nil {
			return err
		}
	}
	host, err := link(p.Link, PodLink, 0, p.Namespace)
	if err != nil {
		return err
	}
	// Its own address is all that a pod knows of its subnet, but on a bridge.
	hop, bits := firstHop, "/32"
	switch p.shape {
	case Bridge:
		bits = "/24"
		err = enslave(host)
	case Ptp:
		err = errors.Join(addAddress(host, hop+"/32"), addRoute(host, p.Addr.String()+"/32", ""))
	default:
		hop = routedHop
		err = errors.Join(
			sysctl("ipv4.conf."+p.Link+".proxy_arp", "1"),
			sysctl("ipv4.neigh."+p.Link+".proxy_delay", "0"), // up to 0.8 s otherwise
			addRoute(host, p.Addr.String()+"/32", ""),
		)
	}
	if err != nil {
		return err
	}
	err = p.Do(func() error {
		eth0, err := netlink.LinkByName(PodLink)
		if err != nil {
			return err
		}
		if err = errors.Join(netlink.LinkSetUp(eth0), addAddress(eth0, p.Addr.String()+bits)); err != nil {
			return err
		}
		if p.shape != Bridge {
			err = addRoute(eth0, hop+"/32", "")
		}
		return errors.Join(err, addRoute(eth0, "0.0.0.0/0", hop), awaitUp(PodLink))
	})
	if err = errors.Join(err, awaitUp(p.Link)); err != nil || p.shape != Bridge {
		return err
	}
	return awaitUp(BridgeName)
}

// Enter makes a container what the pod's programs are started in, and its connections come from.
// It ends with the pod.
func (p *Pod) Enter(c *Container) { p.container = c }

// Start starts a program inside.
func (p *Pod) Start(cmd *exec.Cmd) error {
	if p.container != nil {
		return p.container.Start(cmd)
	}
	return p.Namespace.Start(cmd)
}

// DialContext is Namespace.DialContext, of the container if the pod has one.
func (p *Pod) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if p.container != nil {
		return p.container.DialContext(ctx, network, address)
	}
	return p.Namespace.DialContext(ctx, network, address)
}

// Client is Namespace.Client, of the container if the pod has one.
func (p *Pod) Client(timeout time.Duration) *http.Client { return newClient(p.DialContext, timeout) }

// Close takes the pod off the node.
func (p *Pod) Close() error {
	var err error
	if p.container != nil {
		err = p.container.Close()
	}
	err = errors.Join(err, deleteLink(p.Link))
	if p.shape == Bridge {
		err = errors.Join(err, p.network.leaveBridge())
	}
	return errors.Join(err, p.Namespace.Close())
}

// joinBridge counts one more pod on the bridge, and makes it for the first.
func (n *Network) joinBridge() error {
	n.bridged++
	if n.bridged > 1 {
		return nil
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = BridgeName
	// One of its own, as kubenet's: a bridge without takes that of a port, and
	// changes it as ports come and go.
	attrs.HardwareAddr = net.HardwareAddr{0x0a, 0x58, 10, 244, 0, 1}
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("making the bridge: %w", err)
	}
	bridge, err := netlink.LinkByName(BridgeName)
	if err != nil {
		return fmt.Errorf("finding the bridge: %w", err)
	}
	return errors.Join(netlink.LinkSetUp(bridge), addAddress(bridge, firstHop+"/24"))
}

// enslave makes a link a port of the bridge.
func enslave(port netlink.Link) error {
	bridge, err := netlink.LinkByName(BridgeName)
	if err != nil {
		return fmt.Errorf("finding the bridge: %w", err)
	}
	if err := netlink.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("making %s a port of the bridge: %w", port.Attrs().Name, err)
	}
	return nil
}

// leaveBridge counts one pod less, and removes the bridge after the last.
func (n *Network) leaveBridge() error {
	if n.bridged > 1 {
		n.bridged--
		return nil
	}
	return n.removeBridge()
}

func (n *Network) removeBridge() error {
	if n.bridged == 0 {
		return nil
	}
	n.bridged = 0
	return deleteLink(BridgeName)
}
