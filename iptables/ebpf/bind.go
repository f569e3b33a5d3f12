package ebpf

import (
	"fmt"
	"slices"
)

// Bind says which pods on the host network have identities of their own, by their UIDs: these are
// redirected without HostNetworkAll, too. unbound are those that have none. A pod that is in neither
// list stays redirected as long as it has a cgroup: its object may be gone while its processes run.
// missing is how many bound ones have no cgroup yet: Bind them again soon, because until then they
// get what IMDS gives the node. Like Ensure, which must have succeeded, it must not be called at the
// same time as others.
func (p *Programs) Bind(bound, unbound []string) (missing int, err error) {
	pods, err := podsBelow(p.pods.path)
	if err != nil {
		return len(bound), err
	}
	wanted, found := make(map[cgroupID]bool, len(bound)), make(map[string]bool, len(bound))
	for id, uid := range pods {
		if slices.Contains(bound, uid) {
			wanted[id], found[uid] = true, true
		}
	}
	var id uint64
	var value uint8
	var gone []uint64
	entries := p.objects.Bound.Iterate()
	for entries.Next(&id, &value) {
		if uid, runs := pods[cgroupID(id)]; !runs || slices.Contains(unbound, uid) {
			gone = append(gone, id)
		}
	}
	if err := entries.Err(); err != nil {
		return len(bound), fmt.Errorf("listing the redirected host-network pods: %w", err)
	}
	for _, id := range gone {
		if err := p.objects.Bound.Delete(id); err != nil {
			return len(bound), fmt.Errorf("leaving a host-network pod alone: %w", err)
		}
	}
	for id := range wanted {
		if err := p.objects.Bound.Put(uint64(id), uint8(1)); err != nil {
			return len(bound), fmt.Errorf("redirecting a host-network pod: %w", explain(err))
		}
	}
	return len(bound) - len(found), nil
}
