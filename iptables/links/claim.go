package links

import (
	"errors"
	"fmt"
	"time"
)

// Pod is a pod as the API server names it for an address.
type Pod struct {
	UID string
	// Started is when the latest of its containers started, in whole seconds as in
	// metav1.Time; zero if none has.
	Started time.Time
}

// ErrReused means that the caller may be another pod than the one that the API server
// names: the network plugin frees an address before the API server hears that its pod
// has ended, and for as long as that takes the next pod of the address would pass for
// the one before. It heals when the API server names a pod whose containers started
// after the caller's link appeared.
var ErrReused = errors.New("the address may have been given to another pod")

// iface is an interface of the node. Its fields are guarded by Tracker.mu.
type iface struct {
	index        int
	name         string
	hardwareAddr string
	kind         kind
	listed       uint32 // the number of the listing that it was last in, see eventState
	// appeared is when it appeared, or earlier by as much as may have gone unnoticed;
	// zero for one that was there before the Tracker.
	appeared time.Time
	// holder is the pod that was last seen on it; zero if none was.
	holder Pod
}

// claimLocked accepts or refuses that a pod is the caller on an interface of its own, and
// records an accepted one as its holder. It is accepted if
//
//   - it has been seen there before; or
//   - its containers started after the interface appeared: the kubelet makes a pod's
//     link before its containers, and a new link for new containers of an old pod, and
//   - no pod with younger containers has been seen there, and
//   - the pod itself has not been seen elsewhere with these containers.
//
// Of an interface that was there before the Tracker it is not known when it appeared.
// The first pod that is seen there passes.
func (t *Tracker) claimLocked(on *iface, pod Pod, now time.Time) error {
	if err := t.judgeLocked(on, pod, now); err != nil {
		return err
	}
	if on.holder.UID == pod.UID {
		if pod.Started.After(on.holder.Started) { // a container was restarted
			on.holder.Started = pod.Started
		}
		return nil
	}
	on.holder = pod
	t.departed.Remove(pod.UID)
	return nil
}

// judgeLocked is what claimLocked decides, and records nothing.
func (t *Tracker) judgeLocked(on *iface, pod Pod, now time.Time) error {
	if on.holder.UID == pod.UID {
		return nil
	}
	switch seen := t.seenElsewhereLocked(pod.UID, on); {
	case !on.appeared.IsZero() && !startedSince(pod.Started, on.appeared, now.Sub(on.appeared), now):
		return fmt.Errorf("%w: %s appeared at %s, and the containers of the pod that the API server names %s",
			ErrReused, on.name, on.appeared.UTC().Format(time.RFC3339), startedText(pod.Started))
	case on.holder.UID != "" && pod.Started.Before(on.holder.Started):
		return fmt.Errorf("%w: a pod whose containers started at %s was seen on %s, and those of the pod that the API server names %s",
			ErrReused, on.holder.Started.UTC().Format(time.RFC3339), on.name, startedText(pod.Started))
	case seen != nil && !pod.Started.After(seen.Started):
		return fmt.Errorf("%w: the pod that the API server names was seen on another interface than %s, and its containers have not been restarted since",
			ErrReused, on.name)
	}
	return nil
}

// seenElsewhereLocked returns what a pod was like when it was last seen on another
// interface; nil if it was not. It is off the path of requests whose link is known.
func (t *Tracker) seenElsewhereLocked(uid string, on *iface) (seen *Pod) {
	if started, ok := t.departed.Get(uid); ok {
		seen = &Pod{uid, started}
	}
	for _, other := range t.ifaces {
		if other != on && other.holder.UID == uid && (seen == nil || other.holder.Started.After(seen.Started)) {
			seen = &other.holder
		}
	}
	return seen
}

// startedSince reports whether containers started after an interface appeared, which was
// a time age ago by a clock that is never set, and at appeared by the wall clock. The
// kubelet and the runtime share the node's wall clock. If that was set meanwhile, the
// earlier of both readings counts: a pod must not be refused for it. metav1.Time has
// whole seconds.
func startedSince(started, appeared time.Time, age time.Duration, now time.Time) bool {
	appeared = appeared.Round(0) // the wall clock's reading alone
	if byAge := now.Round(0).Add(-age); byAge.Before(appeared) {
		appeared = byAge
	}
	return !started.Before(appeared.Truncate(time.Second))
}

func startedText(started time.Time) string {
	if started.IsZero() {
		return "have not started"
	}
	return "started at " + started.UTC().Format(time.RFC3339)
}
