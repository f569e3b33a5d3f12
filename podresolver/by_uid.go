package podresolver

import (
	"encoding/hex"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
// object that the API server has of it, its mirror, has another UID, and names the hash in an
// annotation. Whoever may create pods can make such an object. So it names nothing but a hash,
// which is never the UID of another kind of pod, and two of one hash are ambiguous. Nor is it one
// without its node as an owner: the kubelet writes that (CreateMirrorPod), and the API server
// refuses it to kubelets of other nodes (NodeRestriction).
func nodeUID(pod *corev1.Pod) string {
	if pod.Annotations[corev1.MirrorPodAnnotationKey] == "" {
		return string(pod.UID)
	}
	hash := pod.Annotations["kubernetes.io/config.hash"] // ConfigHashAnnotationKey of the kubelet
	if !isManifestHash(hash) || !slices.ContainsFunc(pod.OwnerReferences, func(o metav1.OwnerReference) bool {
		return o.APIVersion == "v1" && o.Kind == "Node" && o.Name == pod.Spec.NodeName
	}) {
		return string(pod.UID)
	}
	return hash
}

// isManifestHash reports whether a UID is one that the kubelet makes of a static pod's manifest: the
// MD5 sum in hexadecimal digits (applyDefaults). A UUID, which the API server gives pods, has dashes.
// So has the UID that a manifest may set itself: such a pod is known by none.
func isManifestHash(uid string) bool {
	const bits = 128 // of MD5
	sum, err := hex.DecodeString(uid)
	return err == nil && 8*len(sum) == bits
}

// bound reports whether the pod has an identity of its own.
func (p *Pod) bound() bool { return len(p.identities)+len(p.pending) > 0 }

// HostNetworkPods returns the UIDs of the pods on the host network by Config.ByUID: of those that have
// identities of their own, and of the others; and whether they are known: not before Synced. They
// change when Addresses' channel says so. A UID that several pods claim is bound if one of these pods
// is: to be refused is better than to get the node's identities.
func (r *Resolver) HostNetworkPods() (bound, unbound []string, ok bool) {
	s := r.current.Load()
	return s.hostNetwork.bound, s.hostNetwork.unbound, s.complete
}
