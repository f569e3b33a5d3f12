package podresolver

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
)

// A caller whose pod the kernel has named needs no address. All that goes by a caller's address,
// here and in the proxy, then goes by one that stands for the pod's UID instead.

// ByUID returns the address that stands for a pod of which the node knows the UID. It is the IPv6
// address ::, which nothing has, in a zone that is called like the UID.
func ByUID(uid string) netip.Addr { return netip.IPv6Unspecified().WithZone(uid) }

// UIDOf returns the UID that an address of ByUID stands for; "" for other addresses.
func UIDOf(caller netip.Addr) string {
	if caller.WithZone("") == netip.IPv6Unspecified() {
		return caller.Zone()
	}
	return ""
}

// describe is an address for an error.
func describe(caller netip.Addr) string {
	if uid := UIDOf(caller); uid != "" {
		return "UID " + uid
	}
	return caller.String()
}

// unknownUID is the ErrUnknownAddress of a caller that is known by its UID.
type unknownUID string

func (uid unknownUID) Error() string {
	return "the API server has not named a pod of this node with UID " + string(uid)
}

// Unwrap returns ErrUnknownAddress.
func (unknownUID) Unwrap() error { return ErrUnknownAddress }

// unknown is the error for a caller that no pod is known to be.
func unknown(caller netip.Addr) error {
	if uid := UIDOf(caller); uid != "" {
		return unknownUID(uid)
	}
	return ErrUnknownAddress
}

// nodeUID is the UID that the node has for a pod. A static pod's is the hash of its manifest; the
// object that the API server has of it, its mirror, has another UID, and names that one in an
// annotation. mirror is whether it is such a one: anybody who may create pods can make an object
// that looks like a mirror.
func nodeUID(pod *corev1.Pod) (uid string, mirror bool) {
	if pod.Annotations[corev1.MirrorPodAnnotationKey] != "" {
		if hash := pod.Annotations["kubernetes.io/config.hash"]; hash != "" { // ConfigHashAnnotationKey of the kubelet
			return hash, true
		}
	}
	return string(pod.UID), false
}

// addUIDs adds the pods by their UIDs to the claims of a snapshot. Unlike an address, a UID stays
// its pod's whatever state that is in. That of a mirror is only what its object says: it counts
// for nothing where it is another pod's own.
func addUIDs(claims, mirrors map[netip.Addr][]*Pod) {
	for caller, pods := range mirrors {
		if _, taken := claims[caller]; !taken {
			claims[caller] = pods
		}
	}
}

// bound reports whether the pod has an identity of its own.
func (p *Pod) bound() bool { return len(p.identities)+len(p.pending) > 0 }

// BoundOnHostNetwork returns the UIDs of the pods on the host network that have identities of their
// own, by Config.ByUID, in any order. They change when Addresses' channel says so.
func (r *Resolver) BoundOnHostNetwork() (uids []string) {
	for caller, o := range r.current.Load().byAddr {
		if uid := UIDOf(caller); uid != "" && o.pod != nil && o.pod.info.hostNetwork && !o.pod.info.finished && o.pod.bound() {
			uids = append(uids, uid)
		}
	}
	return uids
}
