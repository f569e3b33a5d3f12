package podresolver

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func mirrorOf(hash string) podOption {
	return func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: hash, "kubernetes.io/config.hash": hash}
	}
}

// TestUIDOwner: a UID belongs to its pod, in whatever state that is.
func TestUIDOwner(t *testing.T) {
	for name, tc := range map[string]struct {
		pods  map[string][]podOption
		owner string // of UID "u"; "" for none
		err   error
	}{
		"another UID":                {map[string][]podOption{"other": nil}, "", ErrUnknownAddress},
		"without an address":         {map[string][]podOption{"p": {uid("u"), noIP}}, "p", nil},
		"with that of another pod":   {map[string][]podOption{"p": {uid("u")}, "other": nil}, "p", nil},
		"on the host network":        {map[string][]podOption{"p": {uid("u"), hostNetwork}}, "p", nil},
		"finished":                   {map[string][]podOption{"p": {uid("u"), phase(corev1.PodSucceeded)}}, "p", nil},
		"its grace period is over":   {map[string][]podOption{"p": {uid("u"), graceOver}}, "p", nil},
		"mirror":                     {map[string][]podOption{"p": {uid("x"), mirrorOf("u")}}, "p", nil},
		"mirror, by its own UID":     {map[string][]podOption{"p": {uid("u"), mirrorOf("hash")}}, "", ErrUnknownAddress},
		"forged mirror":              {map[string][]podOption{"p": {uid("u")}, "evil": {uid("x"), mirrorOf("u")}}, "p", nil},
		"mirrors of one hash":        {map[string][]podOption{"p": {uid("x"), mirrorOf("u")}, "evil": {uid("y"), mirrorOf("u")}}, "", ErrAmbiguousAddress},
		"hash without a mirror":      {map[string][]podOption{"p": {uid("x"), func(p *corev1.Pod) { p.Annotations = map[string]string{"kubernetes.io/config.hash": "u"} }}}, "", ErrUnknownAddress},
		"mirror replaced by another": {map[string][]podOption{"old": {uid("x"), mirrorOf("u"), terminating}, "p": {uid("y"), mirrorOf("u")}}, "p", nil},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, Config{ByUID: true})
			for name, options := range tc.pods {
				h.put(claimant(name, options...))
			}
			h.update()
			pod, err := h.ResolveNow(ByUID("u"), func(*Pod) error { return nil })
			require.ErrorIs(t, err, tc.err)
			if tc.owner != "" {
				assert.Equal(t, tc.owner, pod.Name)
				assert.Equal(t, pod, h.Owner(ByUID("u")))
			}
			addrs, _ := h.Addresses()
			for _, a := range addrs {
				assert.Empty(t, UIDOf(a), "for those who want addresses")
			}
		})
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

func TestBoundOnHostNetwork(t *testing.T) {
	bound := func(name string, options ...podOption) *corev1.Pod {
		p := resolvertest.Pod(name, "", "x")
		for _, option := range append(options, uid(types.UID(name))) {
			option(p)
		}
		return p
	}
	h := newHarness(t, Config{ByUID: true}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"),
		bound("host", hostNetwork), bound("done", hostNetwork, phase(corev1.PodFailed)), bound("pod"),
		bound("unbound", hostNetwork, func(p *corev1.Pod) { p.Labels = nil }), bound("mirror", hostNetwork, mirrorOf("hash")))
	h.update()
	assert.ElementsMatch(t, []string{"host", "hash"}, h.BoundOnHostNetwork())
}

// A second object that names a static pod's hash must not give the static pod the node's identity:
// it stays redirected, and is refused.
func TestBoundOnHostNetworkAmbiguous(t *testing.T) {
	mirror := func(name string, options ...podOption) *corev1.Pod {
		p := resolvertest.Pod(name, "", "x")
		for _, option := range append(options, mirrorOf("hash")) {
			option(p)
		}
		return p
	}
	h := newHarness(t, Config{ByUID: true}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"),
		mirror("static", uid("1"), hostNetwork))
	h.update()
	assert.Equal(t, []string{"hash"}, h.BoundOnHostNetwork())
	h.put(mirror("evil", uid("2")))
	h.update()
	assert.Equal(t, []string{"hash"}, h.BoundOnHostNetwork())
}

// The UID of a pod that the API server does not name, or not any more, is nobody else's: what a mirror
// says is a hash, not a UID.
func TestMirrorNamesUID(t *testing.T) {
	const real = "aaaaaaaa-0000-4000-8000-000000000001" // deleted from the API server by force; its processes still run
	h := newHarness(t, Config{ByUID: true}, claimant("evil", uid("x"), mirrorOf(real)))
	h.update()
	pod, err := h.ResolveNow(ByUID(real), func(*Pod) error { return nil })
	assert.ErrorIs(t, err, ErrUnknownAddress)
	assert.Nil(t, pod)
}

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
	mirrorOf("v")(p)
	p = p.DeepCopy()
	p.Labels = map[string]string{"aadpodidbinding": "x"}
	p.Spec.HostNetwork = false
	victim := claimant("victim", uid("v"))
	h.put(p, victim)
	assert.Contains(t, h.explain(t), "failed address: ")
}
