package podresolver

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

const manifestHash = "0123456789abcdef0123456789abcdef"

// mirrorOf is the option for what the kubelet of node1 makes of a static pod.
func mirrorOf(hash string) podOption {
	return func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: hash, "kubernetes.io/config.hash": hash}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: p.Spec.NodeName}}
	}
}

func ownedBy(apiVersion, kind, name string) podOption {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: name}}
	}
}

// TestUIDOwner: a UID belongs to its pod, in whatever state that is.
func TestUIDOwner(t *testing.T) {
	for name, tc := range map[string]struct {
		pods  map[string][]podOption
		owner string // of UID "u"; "" for none
		err   error
	}{
		"another UID":              {map[string][]podOption{"other": nil}, "", ErrUnknownAddress},
		"without an address":       {map[string][]podOption{"p": {uid("u"), noIP}}, "p", nil},
		"with that of another pod": {map[string][]podOption{"p": {uid("u")}, "other": nil}, "p", nil},
		"on the host network":      {map[string][]podOption{"p": {uid("u"), hostNetwork}}, "p", nil},
		"finished":                 {map[string][]podOption{"p": {uid("u"), phase(corev1.PodSucceeded)}}, "p", nil},
		"its grace period is over": {map[string][]podOption{"p": {uid("u"), graceOver}}, "p", nil},
		"mirror's own":             {map[string][]podOption{"p": {uid("u"), mirrorOf(manifestHash)}}, "", ErrUnknownAddress},
		"forged mirror":            {map[string][]podOption{"p": {uid("u")}, "evil": {uid("x"), mirrorOf("u")}}, "p", nil},
	} {
		t.Run(name, func(t *testing.T) {
			assertOwner(t, "u", tc.pods, tc.owner, tc.err)
		})
	}
}

// TestManifestHashOwner: the hash of a static pod's manifest belongs to its mirror.
func TestManifestHashOwner(t *testing.T) {
	const uuid = "aaaaaaaa-0000-4000-8000-000000000001"
	for name, tc := range map[string]struct {
		hash  string
		pods  map[string][]podOption
		owner string // "" for none
		err   error
	}{
		"mirror":                       {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash)}}, "p", nil},
		"of another":                   {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf("0" + manifestHash[:31])}}, "", ErrUnknownAddress},
		"two of one hash":              {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash)}, "evil": {uid("y"), mirrorOf(manifestHash)}}, "", ErrAmbiguousAddress},
		"replaced by another":          {manifestHash, map[string][]podOption{"old": {uid("x"), mirrorOf(manifestHash), terminating}, "p": {uid("y"), mirrorOf(manifestHash)}}, "p", nil},
		"hash without a mirror":        {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash), func(p *corev1.Pod) { delete(p.Annotations, corev1.MirrorPodAnnotationKey) }}}, "", ErrUnknownAddress},
		"without an owner":             {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash), func(p *corev1.Pod) { p.OwnerReferences = nil }}}, "", ErrUnknownAddress},
		"owner is another node":        {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash), ownedBy("v1", "Node", "node2")}}, "", ErrUnknownAddress},
		"owner is another kind":        {manifestHash, map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash), ownedBy("example.com/v1", "Node", "node1")}}, "", ErrUnknownAddress},
		"too short":                    {manifestHash[:30], map[string][]podOption{"p": {uid("x"), mirrorOf(manifestHash[:30])}}, "", ErrUnknownAddress},
		"UID that the manifest sets":   {uuid, map[string][]podOption{"p": {uid("x"), mirrorOf(uuid)}}, "", ErrUnknownAddress},
		"UID of a pod that is unknown": {uuid, map[string][]podOption{"evil": {uid("x"), mirrorOf(uuid)}}, "", ErrUnknownAddress}, // deleted by force, and its processes still run
	} {
		t.Run(name, func(t *testing.T) {
			assertOwner(t, tc.hash, tc.pods, tc.owner, tc.err)
		})
	}
}

// assertOwner asserts which of the pods has a UID.
func assertOwner(t *testing.T, uid string, pods map[string][]podOption, owner string, ownerErr error) {
	t.Helper()
	h := newHarness(t, Config{ByUID: true})
	for name, options := range pods {
		h.put(claimant(name, options...))
	}
	h.update()
	pod, err := h.ResolveNow(ByUID(uid), func(*Pod) error { return nil })
	require.ErrorIs(t, err, ownerErr)
	if owner != "" {
		assert.Equal(t, owner, pod.Name)
		assert.Equal(t, pod, h.Owner(ByUID(uid)))
	}
	addrs, _ := h.Addresses()
	for _, a := range addrs {
		assert.Empty(t, UIDOf(a), "for those who want addresses")
	}
}

func TestUIDOf(t *testing.T) {
	assert.Equal(t, "u", UIDOf(ByUID("u")))
	assert.Empty(t, UIDOf(addr))
	assert.Empty(t, UIDOf(netip.Addr{}))
	assert.Empty(t, UIDOf(netip.MustParseAddr("fe80::1%eth0")))
	assert.Empty(t, UIDOf(netip.IPv6Unspecified()))
	assert.NotEqual(t, ByUID("u"), ByUID("v"))
}

// Without ByUID nothing has a UID's address.
func TestNotByUID(t *testing.T) {
	h := newHarness(t, Config{}, claimant("p", uid("u")))
	h.update()
	assert.Nil(t, h.Owner(ByUID("u")))
}

// A pod known by its UID is served before its address is known, and an unknown one waits.
func TestResolveByUID(t *testing.T) {
	h := newHarness(t, Config{ByUID: true, PodWait: time.Minute}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"))
	done := make(chan *Pod)
	go func() {
		pod, err := h.Resolve(t.Context(), ByUID("u"))
		assert.NoError(t, err)
		done <- pod
	}()
	require.Eventually(t, func() bool { requests, _ := h.Waiting(); return requests == 1 }, 10*time.Second, time.Millisecond)
	p := resolvertest.Pod("p", "", "x")
	p.UID = "u"
	h.put(p)
	h.update()
	pod := <-done
	id, err := h.Identity(t.Context(), ByUID("u"), pod, Selector{})
	require.NoError(t, err)
	assert.Equal(t, "i", id.Name)
	caller := ByUID("u")
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		found, _ := h.ResolveNow(caller, func(*Pod) error { return nil })
		_, _ = h.Identity(t.Context(), caller, found, Selector{})
	}))
	_, err = h.ResolveNow(ByUID("w"), func(*Pod) error { return nil })
	require.ErrorContains(t, err, "UID w")
	assert.Contains(t, causeOf(err).fix, "UID")
}

func TestHostNetworkPods(t *testing.T) {
	for name, tc := range map[string]struct {
		pods map[string][]podOption
		want []string
		rest []string // the unbound ones
	}{
		"pods of all kinds": {map[string][]podOption{
			"host": {hostNetwork}, "done": {hostNetwork, phase(corev1.PodFailed)}, "pod": nil, "unbound": {hostNetwork, unbound}, "mirror": {hostNetwork, mirrorOf(manifestHash)},
		}, []string{manifestHash, "host"}, []string{"unbound"}},
		// Refused is better than the node's identities.
		"two of one hash":                {map[string][]podOption{"static": {hostNetwork, mirrorOf(manifestHash)}, "evil": {hostNetwork, unbound, mirrorOf(manifestHash)}}, []string{manifestHash}, nil},
		"two of one hash, both bound":    {map[string][]podOption{"static": {hostNetwork, mirrorOf(manifestHash)}, "evil": {hostNetwork, mirrorOf(manifestHash)}}, []string{manifestHash}, nil},
		"the one of two that is deleted": {map[string][]podOption{"static": {hostNetwork, mirrorOf(manifestHash), terminating}, "evil": {unbound, mirrorOf(manifestHash)}}, []string{manifestHash}, nil},
		"its grace period is over":       {map[string][]podOption{"host": {hostNetwork, graceOver}}, []string{"host"}, nil},
		"none":                           {nil, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, Config{ByUID: true}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"))
			_, _, ok := h.HostNetworkPods()
			assert.False(t, ok, "nothing is known yet")
			for name, options := range tc.pods {
				p := resolvertest.Pod(name, "", "x")
				for _, option := range append(options, uid(types.UID(name))) {
					option(p)
				}
				h.put(p)
			}
			h.update()
			bound, rest, ok := h.HostNetworkPods()
			assert.True(t, ok)
			assert.Equal(t, tc.want, bound)
			assert.ElementsMatch(t, tc.rest, rest)
		})
	}
}

func unbound(p *corev1.Pod) { p.Labels = nil }

func TestExplainByUID(t *testing.T) {
	h := newHarness(t, Config{ByUID: true}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"))
	p := resolvertest.Pod("p", "", "x")
	p.UID = "u"
	h.put(p)
	assert.Contains(t, h.explain(t), "ok address: the kernel names it by its cgroup (UID u), whatever its address is\n")
	hostNetwork(p)
	h.put(p)
	assert.Contains(t, h.explain(t), "ok requests: its connections to IMDS are redirected to the agent\n")
	p = p.DeepCopy()
	p.Labels = nil
	h.put(p)
	assert.Contains(t, h.explain(t), "warning requests: it is on the host network, and nothing is bound to it")
	all := newHarness(t, Config{ByUID: true, HostNetworkAll: true})
	all.put(p)
	assert.Contains(t, all.explain(t), "ok requests: its connections to IMDS are redirected to the agent\n")
	assert.NotContains(t, all.explain(t), "directly")
	mirrorOf(manifestHash)(p)
	p = p.DeepCopy()
	p.Labels = map[string]string{"aadpodidbinding": "x"}
	p.Spec.HostNetwork = false
	h.put(p, claimant("evil", mirrorOf(manifestHash)))
	assert.Contains(t, h.explain(t), "failed address: several live pods claim this address (UID "+manifestHash+"): ")
}
