package ebpf

import (
	"fmt"
	"slices"
)

// Bind says which pods on the host network have identities of their own, by their UIDs: these are
// redirected without HostNetworkAll, too. missing is how many of them have no cgroup yet: Bind
// them again soon, because until then they get what IMDS gives the node. Like Ensure, which must
// have succeeded, it must not be called at the same time as others.
func (p *Programs) Bind(uids []string) (missing int, err error) {
	pods, err := podsBelow(p.pods.path)
	if err != nil {
		return len(uids), err
	}
	wanted, found := make(map[cgroupID]bool, len(uids)), make(map[string]bool, len(uids))
	for id, uid := range pods {
		if slices.Contains(uids, uid) {
			wanted[id], found[uid] = true, true
		}
	}
	var id uint64
	var value uint8
	var gone []uint64
	entries := p.objects.Bound.Iterate()
	for entries.Next(&id, &value) {
		if !wanted[cgroupID(id)] {
			gone = append(gone, id)
		}
	}
	if err := entries.Err(); err != nil {
		return len(uids), fmt.Errorf("listing the redirected host-network pods: %w", err)
	}
	for _, id := range gone {
		if err := p.objects.Bound.Delete(id); err != nil {
			return len(uids), fmt.Errorf("leaving a host-network pod alone: %w", err)
		}
	}
	for id := range wanted {
		if err := p.objects.Bound.Put(uint64(id), uint8(1)); err != nil {
			return len(uids), fmt.Errorf("redirecting a host-network pod: %w", explain(err))
		}
	}
	return len(uids) - len(found), nil
}
