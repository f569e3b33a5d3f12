package testbed

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Addresses of the testbed.
const (
	NodeAddress     = "10.0.0.4"           // of the node's first uplink
	MetadataAddress = "169.254.169.254:80" // of the metadata service

	podNetwork = "10.244.0.0/16"
)

var metadataAddrPort = netip.MustParseAddrPort(MetadataAddress)

// Network is the node's network: its uplinks, and the machine behind them that
// the metadata service runs on. Pods are added to it.
type Network struct {
	Metadata *Namespace // where the metadata service is
	Uplink   *Uplink    // the node's first, and its default route

	uplinks []*Uplink
	pods    int // ever made
	bridged int // pods on the bridge now
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
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Network) connect() error {
	if err := sysctl("ipv4.ip_forward", "1"); err != nil {
		return err
	}
	err := n.Metadata.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return addAddress(lo, "169.254.169.254/32")
	})
	if err != nil {
		return err
	}
	if n.Uplink, err = n.AddUplink(); err != nil {
		return err
	}
	return n.Uplink.Route("0.0.0.0/0")
}

// Close takes the network down, and the pods' bridge if there is one.
func (n *Network) Close() error {
	errs := []error{n.removeBridge()}
	for _, u := range n.uplinks {
		errs = append(errs, deleteLink(u.Name))
	}
	return errors.Join(append(errs, n.Metadata.Close())...)
}

// Uplink is a link between the node and the machine that the metadata service is
// on, with a subnet of its own.
type Uplink struct {
	Name    string // on both sides
	Address string // the node's

	gateway  string // the machine's
	metadata *Namespace
}

// AddUplink adds a link, eth1 for the second, that no route uses yet.
func (n *Network) AddUplink() (*Uplink, error) {
	i := len(n.uplinks)
	u := &Uplink{
		Name: fmt.Sprintf("eth%d", i), Address: fmt.Sprintf("10.0.%d.4", i),
		gateway: fmt.Sprintf("10.0.%d.1", i), metadata: n.Metadata,
	}
	here, err := AddLink(u.Name, 0, n.Metadata)
	if err != nil {
		return nil, err
	}
	n.uplinks = append(n.uplinks, u)
	if err = addAddress(here, u.Address+"/24"); err != nil {
		return nil, err
	}
	err = n.Metadata.Do(func() error {
		far, err := netlink.LinkByName(u.Name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(far), addAddress(far, u.gateway+"/24"), awaitUp(u.Name))
	})
	return u, errors.Join(err, awaitUp(u.Name))
}

// Route moves the node's route to a destination to this uplink, or adds it there,
// and with it the machine's route back to the pods: an answer comes in where the
// request went out, whatever rp_filter says.
func (u *Uplink) Route(destination string) error {
	err := u.metadata.Do(func() error { return setRoute(u.Name, podNetwork, u.Address) })
	return errors.Join(err, setRoute(u.Name, destination, u.gateway))
}
