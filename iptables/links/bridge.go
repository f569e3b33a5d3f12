package links

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// port is the bridge port that an address is behind.
type port struct {
	bridge, index int
	hardwareAddr  string
}

// checkPortLocked is claimLocked for a connection that came in over a bridge. The kernel
// does not say over which port. But the handshake's replies went to the address's
// hardware address (ARP), and the bridge's forwarding database has the port of that. A
// pod that takes over both is behind another port than their owner was.
func (t *Tracker) checkPortLocked(bridge *iface, addr netip.Addr, pod Pod, now time.Time) error {
	port, err := t.portLocked(bridge.index, addr)
	if err != nil {
		return fmt.Errorf("address %s on %s: %w", addr, bridge.name, err)
	}
	ingress := t.ifaces[port.index]
	if ingress == nil {
		return fmt.Errorf("%w: its port of %s (index %d) is gone", ErrReused, bridge.name, port.index)
	}
	if err := ingress.classify(); err != nil {
		return err
	}
	if ingress.kind != kindPod {
		// Several pods may be behind it. One that owned a port of its own is not.
		if other := t.ownerElsewhereLocked(pod.UID, ingress); other != nil && !pod.Started.After(other.Started) {
			return fmt.Errorf("%w: it is behind %s, and the API server's pod was seen on another interface", ErrReused, ingress.name)
		}
		return nil
	}
	return t.claimLocked(ingress, pod, now)
}

// portLocked finds the port that an address is behind, and caches it until the kernel
// announces a change.
func (t *Tracker) portLocked(bridge int, addr netip.Addr) (port, error) {
	if known, ok := t.ports[addr]; ok && known.bridge == bridge {
		return known, nil
	}
	if !t.events.neighbours {
		if err := t.socket.join(unix.RTNLGRP_NEIGH); err != nil {
			return port{}, fmt.Errorf("subscribing to neighbours: %w", err)
		}
		t.events.neighbours = true
	}
	neighbours, err := netlink.NeighList(bridge, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return port{}, fmt.Errorf("listing neighbours: %w", err)
	}
	hardwareAddr := hardwareAddrOf(neighbours, addr)
	if hardwareAddr == nil {
		return port{}, errors.New("no neighbour entry (ARP)")
	}
	entries, err := netlink.NeighListExecute(netlink.Ndmsg{Family: unix.AF_BRIDGE})
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return port{}, fmt.Errorf("listing the bridge's forwarding database: %w", err)
	}
	found := port{bridge: bridge, hardwareAddr: string(hardwareAddr)}
	for _, e := range entries {
		if e.MasterIndex != bridge || e.Flags&netlink.NTF_SELF != 0 || !bytes.Equal(e.HardwareAddr, hardwareAddr) {
			continue
		}
		if found.index != 0 && found.index != e.LinkIndex {
			return port{}, fmt.Errorf("its hardware address %s is behind several ports", hardwareAddr)
		}
		found.index = e.LinkIndex
	}
	if found.index == 0 {
		return port{}, fmt.Errorf("its hardware address %s is behind no port", hardwareAddr)
	}
	if len(t.ports) >= maxAddresses {
		clear(t.ports)
	}
	t.ports[addr] = found
	return found, nil
}

func hardwareAddrOf(neighbours []netlink.Neigh, addr netip.Addr) net.HardwareAddr {
	for _, n := range neighbours {
		if of, ok := netip.AddrFromSlice(n.IP.To4()); ok && of == addr && n.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) == 0 {
			return n.HardwareAddr
		}
	}
	return nil
}

// applyNeighbourLocked drops cached ports that a change affects (struct ndmsg and
// attributes): of a neighbour, the port of its address; of a bridge's forwarding
// database, those of its hardware address.
func (t *Tracker) applyNeighbourLocked(body []byte) {
	if len(body) < unix.SizeofNdMsg {
		return
	}
	family := body[0]
	for kind, value := range Attributes(body[unix.SizeofNdMsg:]) {
		switch {
		case family == unix.AF_INET && kind == unix.NDA_DST:
			if addr, ok := netip.AddrFromSlice(value); ok {
				delete(t.ports, addr)
				delete(t.routes, addr) // may no longer be pinned
			}
		case family == unix.AF_BRIDGE && kind == unix.NDA_LLADDR:
			t.forgetPortsLocked(func(_ netip.Addr, p port) bool { return p.hardwareAddr == string(value) })
		}
	}
}

func (t *Tracker) forgetPortsLocked(which func(netip.Addr, port) bool) {
	maps.DeleteFunc(t.ports, which)
}
