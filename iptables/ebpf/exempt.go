package ebpf

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// maxExempt is how many agents there are during a handover.
const maxExempt = 2

// addExempt adds the cgroup of the agent's own container to those that reach the metadata
// service. Of others the newest stays: that of the agent which this one takes over from, and
// which has requests under way.
func addExempt(m *ebpf.Map, own cgroupID) error {
	var added uint64
	if err := m.Lookup(uint64(own), &added); err != nil {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
			return err
		}
		if err := m.Put(uint64(own), uint64(now.Nano())); err != nil { //nolint:gosec // not negative
			return fmt.Errorf("exempting the agent's own connections: %w", explain(err))
		}
	}
	for {
		var id, oldest, count uint64
		var since, first uint64
		entries := m.Iterate()
		for entries.Next(&id, &since) {
			count++
			if cgroupID(id) != own && (oldest == 0 || since < first) {
				oldest, first = id, since
			}
		}
		if err := entries.Err(); err != nil {
			return fmt.Errorf("listing the exempt cgroups: %w", err)
		}
		if count <= maxExempt {
			return nil
		}
		if err := m.Delete(oldest); err != nil {
			return fmt.Errorf("removing an exempt cgroup: %w", err)
		}
	}
}
