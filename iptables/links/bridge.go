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

// port is the port of a bridge that an address was found behind: its answers go there.
type port struct {
	bridge, index int
	hardwareAddr  string
}

// checkPortLocked is claimLocked for a connection that came in over a bridge. Of that the
// kernel says no more, but the answers which made up the handshake went to the address's
// hardware address (ARP), and that is behind a port (the bridge's forwarding database).
// Whoever takes both over is behind another port than the pod was.
func (t *Tracker) checkPortLocked(bridge *iface, addr netip.Addr, pod Pod, now time.Time) error {
	found, err := t.portLocked(bridge.index, addr)
	if err != nil {
		return fmt.Errorf("address %s on %s: %w", addr, bridge.name, err)
	}
	on := t.ifaces[found.index]
	if on == nil {
		return fmt.Errorf("%w: its port of %s (index %d) is gone", ErrReused, bridge.name, found.index)
	}
	if err := on.classify(); err != nil {
		return err
	}
	if on.kind != kindPod {
		// Perhaps several pods are behind it. One that was seen on a port of its own has
		// left that.
		if seen := t.seenElsewhereLocked(pod.UID, on); seen != nil && !pod.Started.After(seen.Started) {
			return fmt.Errorf("%w: it is behind %s, and the pod that the API server names was seen elsewhere", ErrReused, on.name)
		}
		return nil
	}
	return t.claimLocked(on, pod, now)
}

// portLocked finds the port that an address is behind. What it finds is remembered until
// the kernel announces a change.
func (t *Tracker) portLocked(bridge int, addr netip.Addr) (port, error) {
	if known, ok := t.ports[addr]; ok && known.bridge == bridge {
		return known, nil
	}
	if !t.events.neighbours {
		if err := t.socket.join(unix.RTNLGRP_NEIGH); err != nil {
			return port{}, fmt.Errorf("watching neighbours: %w", err)
		}
		t.events.neighbours = true
	}
	neighbours, err := netlink.NeighList(bridge, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return port{}, fmt.Errorf("listing neighbours: %w", err)
	}
	hardwareAddr := hardwareAddrOf(neighbours, addr)
	if hardwareAddr == nil {
		return port{}, errors.New("the node has no hardware address of it (neighbour entry)")
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

// applyNeighbourLocked forgets what a change of neighbours bears on: struct ndmsg and
// attributes. Of an address it is a change of its hardware address, of a bridge's
// forwarding database one of the hardware address's port.
func (t *Tracker) applyNeighbourLocked(body []byte) {
	if len(body) < unix.SizeofNdMsg {
		return
	}
	family := body[0]
	for kind, value := range attributes(body[unix.SizeofNdMsg:]) {
		switch {
		case family == unix.AF_INET && kind == unix.NDA_DST:
			if addr, ok := netip.AddrFromSlice(value); ok {
				delete(t.ports, addr)
				delete(t.routes, addr) // it may have been pinned
			}
		case family == unix.AF_BRIDGE && kind == unix.NDA_LLADDR:
			t.forgetPortsLocked(func(_ netip.Addr, p port) bool { return p.hardwareAddr == string(value) })
		}
	}
}

func (t *Tracker) forgetPortsLocked(which func(netip.Addr, port) bool) {
	maps.DeleteFunc(t.ports, which)
}
