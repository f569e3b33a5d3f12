package links

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Guarded is Check for a caller that is known by something else than its address: it returns nil
// unless other pods can take over the addresses of the pod, and with them what is sent to it. Then
// its error wraps ErrUnguarded. Other errors are temporary.
func (t *Tracker) Guarded(ifindex int, addrs []netip.Addr) error {
	now := time.Now()
	t.mu.RLock()
	ingress := t.ifaces[ifindex]
	known := ingress != nil && (ingress.kind == kindPod || ingress.kind == kindOther) || len(addrs) > 0
	for _, addr := range addrs {
		route := t.routes[addr]
		known = known && (!addr.Is4() || route != nil && route.err == nil && now.Before(route.until))
	}
	t.mu.RUnlock()
	if known {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.drainLocked(); err != nil {
		return err
	}
	for _, addr := range addrs {
		if !addr.Is4() { // the metadata service has no other
			continue
		}
		if err := t.routeLocked(addr, now).err; errors.Is(err, ErrUnguarded) {
			return err
		}
	}
	if ingress := t.ifaces[ifindex]; len(addrs) == 0 && ingress != nil && ingress.classify() == nil && ingress.kind == kindBridge && !t.cfg.AllowUnguarded {
		return fmt.Errorf("the pod's address on %s is not known yet", ingress.name)
	}
	return nil
}
