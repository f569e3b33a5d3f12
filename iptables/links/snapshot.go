package links

import "time"

// Snapshot is what a Tracker knows of an interface and another could not find out: an agent
// that takes over from another has it from that one. Without it, the new agent would accept
// the first pod that the API server names on each interface, although that pod may have ended.
type Snapshot struct {
	Index        int    // 0 for an interface that is gone, of which only the owner is known
	Name         []byte // bytes, as the next: encoders of text would change them
	HardwareAddr []byte
	Appeared     time.Time // zero if that is not known
	Owner        Pod       // zero for none
}

// Export returns a Snapshot of each interface, and of the last owners of those that are gone.
func (t *Tracker) Export() ([]Snapshot, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.drainLocked(); err != nil {
		return nil, err
	}
	var all []Snapshot
	for _, i := range t.ifaces {
		all = append(all, Snapshot{i.index, []byte(i.name), []byte(i.hardwareAddr), i.appeared.Round(0), i.owner})
	}
	for _, uid := range t.departed.Keys() {
		if started, ok := t.departed.Peek(uid); ok {
			all = append(all, Snapshot{Owner: Pod{uid, started}})
		}
	}
	return all, nil
}

// Import takes over what another Tracker has exported. What this one has seen itself counts
// more.
func (t *Tracker) Import(all []Snapshot) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.drainLocked(); err != nil {
		return err
	}
	for _, s := range all {
		i := t.ifaces[s.Index]
		if i == nil || i.name != string(s.Name) || i.hardwareAddr != string(s.HardwareAddr) { // it is gone
			if last, ok := t.departed.Peek(s.Owner.UID); s.Owner.UID != "" && (!ok || s.Owner.Started.After(last)) {
				t.departed.Add(s.Owner.UID, s.Owner.Started)
			}
			continue
		}
		if i.appeared.IsZero() {
			i.appeared = s.Appeared
		}
		if i.owner.UID == "" {
			i.owner = s.Owner
		}
	}
	return nil
}
