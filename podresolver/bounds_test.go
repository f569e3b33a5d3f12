package podresolver

import (
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// refused returns the error of the pod of 10.0.0.1.
func (h *harness) refused(t *testing.T, want Selector) error {
	t.Helper()
	h.update()
	pod, err := h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
	require.NoError(t, err)
	_, err = pod.Identity(want)
	require.Error(t, err)
	return err
}

// Fields as long as an object may be: what is kept and said of them is short. Whoever may write
// bindings in one namespace could otherwise fill the agent's memory, and hold its lock.
func TestLongFields(t *testing.T) {
	long := strings.Repeat(" ", 1000) + strings.Repeat("A", 1<<20)
	objects := []any{resolvertest.Pod("p", "10.0.0.1", "x")}
	for i := range 10 {
		principal := resolvertest.Identity(fmt.Sprint("i", i), resolvertest.GUID(fmt.Sprint(i)), "")
		principal.Spec.Type, principal.Spec.TenantID = aadpodidentity.ServicePrincipal, long
		principal.Spec.ClientPassword = aadpodidentity.SecretReference{Name: "s"}
		for j := range 100 {
			principal.Spec.AuxiliaryTenantIDs = append(principal.Spec.AuxiliaryTenantIDs, fmt.Sprint(long, j))
		}
		objects = append(objects, principal, resolvertest.Binding(fmt.Sprint("b", i), "x", fmt.Sprint("i", i)),
			resolvertest.Binding(fmt.Sprint("missing", i), "x", long), resolvertest.Binding(fmt.Sprint("selector", i), long, "x"))
	}
	h := newHarness(t, Config{}, objects...)
	err := h.refused(t, Selector{ClientID: "other"})
	assert.Less(t, len(err.Error()), 64<<10)
	hint := h.Hint(err)
	assert.Less(t, len(hint.Fix)+len(hint.NearMisses), 64<<10)
	d, err := h.Explain("shop", "p", Selector{}, nil)
	require.NoError(t, err)
	said := 0
	for _, step := range d.Steps {
		said += len(strings.Join(step.Texts, ""))
	}
	assert.Less(t, said, 128<<10)
}

// A binding whose selector was cut matches no label that begins like it.
func TestCutFieldsMatchNothing(t *testing.T) {
	assert.Equal(t, strings.Repeat("a", maxField), bounded(strings.Repeat("a", maxField)))
	cut := bounded(strings.Repeat("a", maxField+1))
	assert.NotEqual(t, strings.Repeat("a", maxField), cut)
	assert.LessOrEqual(t, len(cut), maxField+len("…"))
}

// Bindings whose identity is missing are looked at up to a number, since each is compared with every
// AzureIdentity.
func TestManyMissingIdentities(t *testing.T) {
	objects := []any{resolvertest.Pod("p", "10.0.0.1", "x")}
	for i := range 300 {
		objects = append(objects, resolvertest.Binding(fmt.Sprint("b", i), "x", "GONE"), resolvertest.In(fmt.Sprint("ns", i), resolvertest.Identity("gone", resolvertest.GUID(fmt.Sprint(i)), "")))
	}
	h := newHarness(t, Config{}, objects...)
	h.update()
	h.objects.mu.Lock()
	defer h.objects.mu.Unlock()
	for _, info := range h.objects.pods {
		assert.LessOrEqual(t, len(h.nearBindingsLocked(info, "x")), (maxDescribed+1)*(maxDescribed+1))
	}
}

// manyLabels are some hundred kilobytes.
func manyLabels(prefix, value string) map[string]string {
	labels := make(map[string]string)
	for i := range 10_000 {
		labels[fmt.Sprint(prefix, i)] = value
	}
	return labels
}

// Of a pod with too many labels its binding alone counts, and of an exception with too many none does:
// 250 pods of a megabyte each would fill the agent's memory.
func TestManyLabels(t *testing.T) {
	many, one := manyLabels("l", "x"), map[string]string{"l1": "x"}
	for name, tc := range map[string]struct {
		pod, exception map[string]string
		excepted       bool
		near           string
	}{
		"few":           {one, one, true, ""},
		"the pod's":     {many, one, false, `no AzurePodIdentityException applies: it has more than 8 KiB of labels, of which the agent knows "aadpodidbinding" alone`},
		"the exception": {one, many, false, "AzurePodIdentityException shop/e does not apply: it lists more than 8 KiB of labels"},
	} {
		p := resolvertest.Pod("p", "10.0.0.1", "cart")
		maps.Copy(p.Labels, tc.pod)
		h := newHarness(t, Config{}, resolvertest.Exception("e", tc.exception), p, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "cart", "i"))
		h.update()
		pod, err := h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
		require.NoError(t, err, name)
		assert.Equal(t, tc.excepted, pod.Exception() != "", name)
		if tc.excepted {
			continue
		}
		id, err := pod.Identity(Selector{})
		require.NoError(t, err, name)
		assert.Equal(t, resolvertest.GUID("c"), id.ClientID, name)
		d, err := h.Explain("shop", "p", Selector{}, nil)
		require.NoError(t, err, name)
		assert.Contains(t, fmt.Sprint(d.Steps), tc.near, name)
		for _, info := range h.objects.pods {
			assert.Less(t, len(info.labels), 200, name)
		}
	}
	h := newHarness(t, Config{})
	p := resolvertest.Pod("p", "10.0.0.1", "cart")
	p.Labels["app"], p.Status.Phase = "x", corev1.PodSucceeded
	assert.Equal(t, map[string]string{aadpodidentity.BindingLabel: "cart"}, h.trimPod(p).labels, "of a finished pod")
}

// In mode standard bindings of any namespace count. What they say is not for the namespace of the pod.
func TestForeign(t *testing.T) {
	inBank := func(o *aadpodidentity.AzureIdentityBinding) any { return resolvertest.In("bank", o) }
	for name, tc := range map[string]struct {
		mode    Mode
		binding any
		foreign bool
	}{
		"its own":               {Standard, resolvertest.Binding("b", "cart", "gone"), false},
		"of another namespace":  {Standard, inBank(resolvertest.Binding("b", "cart", "gone")), true},
		"another, mode managed": {Managed, inBank(resolvertest.Binding("b", "cart", "gone")), false},
	} {
		h := newHarness(t, Config{Mode: tc.mode}, tc.binding, resolvertest.Pod("p", "10.0.0.1", "cart"))
		h.update()
		pod, err := h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
		require.NoError(t, err)
		assert.Equal(t, tc.foreign, pod.Foreign(), name)
	}
}

// What is kept of a field does not keep the white space around it, nor the rest of one that was cut.
func TestKeptFieldsAreCopies(t *testing.T) {
	const objects = 50
	var kept []any
	var memory runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&memory)
	before := memory.HeapAlloc
	for i := range objects {
		long := strings.Repeat(" ", 1<<20) + fmt.Sprint("a", i)
		federated := resolvertest.Identity("i", long, long)
		federated.Annotations = map[string]string{aadpodidentity.FederatedAnnotation: "true"}
		federated.Spec.TenantID, federated.Spec.ADEndpoint = long, long
		account := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{ClientIDAnnotation: long, TenantIDAnnotation: long, AdditionalClientIDsAnnotation: long + "b"}}}
		kept = append(kept, newIdentityInfo(federated), newAccountInfo(account))
	}
	runtime.GC()
	runtime.ReadMemStats(&memory)
	assert.Less(t, int64(memory.HeapAlloc)-int64(before), int64(objects<<20/10), "of %d MiB", 3*objects)
	runtime.KeepAlive(kept)
}

// A pod's identities are bounded: those of the oldest bindings count, and whoever asks is told.
func TestIdentitiesOfPodAreBounded(t *testing.T) {
	for _, mode := range []Mode{Managed, Standard} {
		objects := []any{resolvertest.Pod("p", "10.0.0.1", "x")}
		for i := range 3 * maxIdentities {
			name := fmt.Sprintf("i%03d", i)
			id, binding := resolvertest.Identity(name, resolvertest.GUID(name), ""), resolvertest.Binding("b"+name, "x", name)
			objects = append(objects, id, binding)
			if mode == Standard {
				objects = append(objects, resolvertest.Assigned("a"+name, "p", "Assigned", id, binding))
			}
		}
		h := newHarness(t, Config{Mode: mode}, objects...)
		h.update()
		d, err := h.Explain("shop", "p", Selector{}, nil)
		require.NoError(t, err)
		require.Len(t, d.Identities, maxIdentities, mode)
		assert.Equal(t, "i000", d.Identities[0].Name, "bindings of one age are sorted by name")
		assert.Equal(t, fmt.Sprintf("i%03d", maxIdentities-1), d.Identities[maxIdentities-1].Name)
		assert.LessOrEqual(t, len(d.Pending), maxIdentities)
		assert.Contains(t, h.explain(t), "300 AzureIdentityBindings match it, and a pod has 100 identities of its own namespace at most")
		assert.ErrorIs(t, h.refused(t, Selector{ClientID: resolvertest.GUID("i200")}), ErrNoIdentity)
	}
}

// Authors in other namespaces, whose bindings are older, do not keep a pod from its own identity.
func TestIdentitiesOfOtherNamespaces(t *testing.T) {
	own, binding := resolvertest.Identity("own", resolvertest.GUID("own"), ""), resolvertest.Binding("own", "x", "own")
	objects := []any{resolvertest.Pod("p", "10.0.0.1", "x"), own, binding, resolvertest.Assigned("own", "p", "Assigned", own, binding)}
	for i := range 2 * maxIdentities {
		name := fmt.Sprintf("i%03d", i)
		id := resolvertest.In("bank", resolvertest.Identity(name, resolvertest.GUID(name), ""))
		binding := resolvertest.In("bank", resolvertest.BindingOfAge("b"+name, "x", name, time.Hour))
		objects = append(objects, id, binding, resolvertest.Assigned("a"+name, "p", "Assigned", id, binding))
	}
	h := newHarness(t, Config{Mode: Standard}, objects...)
	h.update()
	d, err := h.Explain("shop", "p", Selector{ClientID: resolvertest.GUID("own")}, nil)
	require.NoError(t, err)
	require.NoError(t, d.Refusal)
	assert.Equal(t, "own", d.Chosen.Name)
	assert.Len(t, d.Identities, maxIdentities+1)
}
