package links

import (
	"errors"
	"fmt"
	"time"
)

// Pod is the pod that has an address according to the API server.
type Pod struct {
	UID string
	// Started is the latest start of its containers, in whole seconds as in metav1.Time;
	// zero if none has started.
	Started time.Time
}

// ErrReused means that the caller may be another pod than the one that the API server
// names: the network plugin frees an address before the API server learns that its pod
// has ended, and until then the address's next pod would pass for the previous one. The
// error ends when the API server names a pod whose containers started after the caller's
// interface appeared.
var ErrReused = errors.New("the address may have been given to another pod")

// iface is an interface of the node. Its fields are guarded by Tracker.mu.
type iface struct {
	index        int
	name         string
	hardwareAddr string
	kind         kind
	listed       uint32 // the number of the last listing that had it, see eventState
	// appeared is when it appeared, or a little earlier, by the time that the kernel's
	// announcement may have been unread; zero if it is older than the Tracker.
	appeared time.Time
	// owner is the pod that was last accepted on it; zero for none.
	owner Pod
}

// claimLocked accepts or refuses a pod as the caller over a pod's interface, and records
// an accepted pod as the owner. It accepts the owner, and a pod
//
//   - whose containers started after the interface appeared: the kubelet has a pod's
//     interface created before its containers, and a new one before new containers; and
//   - whose containers started no earlier than the owner's; and
//   - that does not own, or last owned, another interface with the same containers.
//
// When an interface older than the Tracker appeared is unknown. The first pod is accepted
// on it.
func (t *Tracker) claimLocked(ingress *iface, pod Pod, now time.Time) error {
	if err := t.checkClaimLocked(ingress, pod, now); err != nil {
		return err
	}
	if ingress.owner.UID == pod.UID {
		if pod.Started.After(ingress.owner.Started) { // a container was restarted
			ingress.owner.Started = pod.Started
		}
		return nil
	}
	ingress.owner = pod
	t.departed.Remove(pod.UID)
	return nil
}

// checkClaimLocked is claimLocked without the recording.
func (t *Tracker) checkClaimLocked(ingress *iface, pod Pod, now time.Time) error {
	if ingress.owner.UID == pod.UID {
		return nil
	}
	switch elsewhere := t.ownerElsewhereLocked(pod.UID, ingress); {
	case !ingress.appeared.IsZero() && !startedSince(pod.Started, ingress.appeared, now.Sub(ingress.appeared), now):
		return fmt.Errorf("%w: %s appeared at %s, and the containers of the API server's pod %s",
			ErrReused, ingress.name, ingress.appeared.UTC().Format(time.RFC3339), startedText(pod.Started))
	case ingress.owner.UID != "" && pod.Started.Before(ingress.owner.Started):
		return fmt.Errorf("%w: %s belongs to a pod whose containers started at %s, and those of the API server's pod %s",
			ErrReused, ingress.name, ingress.owner.Started.UTC().Format(time.RFC3339), startedText(pod.Started))
	case elsewhere != nil && !pod.Started.After(elsewhere.Started):
		return fmt.Errorf("%w: the API server's pod was seen on another interface than %s, and its containers have not restarted since",
			ErrReused, ingress.name)
	}
	return nil
}

// ownerElsewhereLocked returns the pod as it last was the owner of another interface; nil
// if it never was. It is not called for requests from an owner.
func (t *Tracker) ownerElsewhereLocked(uid string, ingress *iface) (last *Pod) {
	if started, ok := t.departed.Get(uid); ok {
		last = &Pod{uid, started}
	}
	for _, other := range t.ifaces {
		if other != ingress && other.owner.UID == uid && (last == nil || other.owner.Started.After(last.Started)) {
			last = &other.owner
		}
	}
	return last
}

// startedSince reports whether containers started after an interface appeared: age ago by
// the monotonic clock, and at appeared by the wall clock, which the kubelet and the
// container runtime use too. If the wall clock was set since, the earlier reading counts,
// so that no pod is refused for it. metav1.Time has whole seconds.
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
