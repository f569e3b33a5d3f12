package podresolver

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

type (
	azureIdentity = aadpodidentity.AzureIdentity
	azureAssigned = aadpodidentity.AzureAssignedIdentity
)

func behaviour(value string) func(*azureIdentity) {
	return func(id *azureIdentity) {
		id.Annotations = map[string]string{aadpodidentity.BehaviorAnnotation: value}
	}
}

func TestAssignment(t *testing.T) {
	var (
		id = func() *azureIdentity {
			return resolvertest.Identity("i", resolvertest.GUID("C1"), resolvertest.ResourceID("/R/1"))
		}
		b      = resolvertest.Binding("b", "x", "i")
		abroad = resolvertest.In("bank", id())
	)
	for name, tc := range map[string]struct {
		assigned *azureAssigned
		forced   bool // Config.Namespaced
		want     error
	}{
		"that is Assigned":                   {resolvertest.Assigned("a", "cart-0", "Assigned", id(), b), false, nil},
		"that has no state":                  {resolvertest.Assigned("a", "cart-0", "", id(), b), false, nil},
		"that is Created":                    {resolvertest.Assigned("a", "cart-0", "Created", id(), b), false, ErrNotAssigned},
		"that is Unassigned":                 {resolvertest.Assigned("a", "cart-0", "Unassigned", id(), b), false, ErrNoIdentity},
		"in an unknown state":                {resolvertest.Assigned("a", "cart-0", "assigned", id(), b), false, ErrNoIdentity},
		"to another pod":                     {resolvertest.Assigned("a", "cart-1", "Assigned", id(), b), false, ErrNoIdentity},
		"to a pod of another namespace":      {resolvertest.With(resolvertest.Assigned("a", "cart-0", "Assigned", id(), b), func(a *azureAssigned) { a.Spec.PodNamespace = "bank" }), false, ErrNoIdentity},
		"to a pod of another node":           {resolvertest.With(resolvertest.Assigned("a", "cart-0", "Assigned", id(), b), func(a *azureAssigned) { a.Spec.NodeName = "node2" }), false, ErrNoIdentity},
		"without an identity":                {resolvertest.Assigned("a", "cart-0", "Assigned", nil, b), false, ErrNoIdentity},
		"without a binding":                  {resolvertest.Assigned("a", "cart-0", "Assigned", id(), nil), false, nil},
		"of an identity without IDs":         {resolvertest.Assigned("a", "cart-0", "Assigned", resolvertest.Identity("i", "", ""), b), false, ErrNoIdentity},
		"by another label":                   {resolvertest.Assigned("a", "cart-0", "Assigned", id(), resolvertest.Binding("b", "y", "i")), false, ErrNoIdentity},
		"by a label in another case":         {resolvertest.Assigned("a", "cart-0", "Assigned", id(), resolvertest.Binding("b", "X", "i")), false, ErrNoIdentity},
		"of the pod's namespace":             {resolvertest.Assigned("a", "cart-0", "Assigned", id(), b), true, nil},
		"of another namespace":               {resolvertest.Assigned("a", "cart-0", "Assigned", abroad, resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))), false, nil},
		"of another namespace, forced":       {resolvertest.Assigned("a", "cart-0", "Assigned", abroad, resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))), true, ErrNoIdentity},
		"of another namespace, annotated":    {resolvertest.Assigned("a", "cart-0", "Assigned", resolvertest.With(resolvertest.In("bank", id()), behaviour("namespaced")), b), false, ErrNoIdentity},
		"of another one, in another case":    {resolvertest.Assigned("a", "cart-0", "Assigned", resolvertest.With(resolvertest.In("bank", id()), behaviour("Namespaced")), b), false, ErrNoIdentity},
		"of another one, otherwise":          {resolvertest.Assigned("a", "cart-0", "Assigned", resolvertest.With(resolvertest.In("bank", id()), behaviour("clustered")), b), false, nil},
		"of the pod's namespace, annotated":  {resolvertest.Assigned("a", "cart-0", "Assigned", resolvertest.With(id(), behaviour("namespaced")), b), false, nil},
		"Created, of another one, annotated": {resolvertest.Assigned("a", "cart-0", "Created", resolvertest.With(resolvertest.In("bank", id()), behaviour("namespaced")), b), false, ErrNoIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHarness(t, Config{Mode: Standard, Namespaced: tc.forced}, tc.assigned).decide(resolvertest.Pod("cart-0", "", "x"))
			for _, want := range []Selector{{}, {ClientID: resolvertest.GUID("c1")}, {ClientID: resolvertest.GUID("C1")}, {ResourceID: resolvertest.ResourceID("/r/1")}, {ResourceID: resolvertest.ResourceID("/R/1")}} {
				got, err := p.Identity(want)
				require.ErrorIs(t, err, tc.want)
				if tc.want == nil {
					assert.Equal(t, "i", got.Name)
					assert.Equal(t, resolvertest.GUID("c1"), got.ClientID)
				}
			}
			_, err := p.Identity(Selector{ClientID: resolvertest.GUID("c2")})
			require.ErrorIs(t, err, ErrNoIdentity)
			_, err = p.Identity(Selector{ObjectID: "c1"})
			require.ErrorIs(t, err, ErrNoIdentity)
		})
	}
}

func TestManagedModeIgnoresAssignments(t *testing.T) {
	p := newHarness(t, Config{}, resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("i", resolvertest.GUID("c"), ""), nil)).decide(resolvertest.Pod("p", "", "x"))
	_, err := p.Identity(Selector{})
	assert.ErrorIs(t, err, ErrNoIdentity)
}

// TestBindingWithoutAssignment: MIC has not assigned the identity yet.
func TestBindingWithoutAssignment(t *testing.T) {
	for name, tc := range map[string]struct {
		objects []any
		forced  bool
		want    error
		why     string
	}{
		"nothing":                          {nil, false, ErrNoIdentity, `no AzureIdentityBinding has the selector "x"`},
		"nothing, forced":                  {nil, true, ErrNoIdentity, `no AzureIdentityBinding in namespace "shop" has the selector "x"`},
		"one of the pod's namespace":       {[]any{resolvertest.Identity("i", resolvertest.GUID("C1"), ""), resolvertest.Binding("b", "x", "i")}, false, ErrNotAssigned, "shop/i"},
		"one of another selector":          {[]any{resolvertest.Identity("i", resolvertest.GUID("C1"), ""), resolvertest.Binding("b", "y", "i")}, false, ErrNoIdentity, ""},
		"one whose identity is missing":    {[]any{resolvertest.Binding("b", "x", "i")}, false, ErrNoIdentity, "does not exist"},
		"one of another namespace":         {[]any{resolvertest.In("bank", resolvertest.Identity("i", resolvertest.GUID("C1"), "")), resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))}, false, ErrNotAssigned, "bank/i"},
		"one of another namespace, forced": {[]any{resolvertest.In("bank", resolvertest.Identity("i", resolvertest.GUID("C1"), "")), resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))}, true, ErrNoIdentity, ""},
		"one of another, annotated":        {[]any{resolvertest.With(resolvertest.In("bank", resolvertest.Identity("i", resolvertest.GUID("C1"), "")), behaviour("namespaced")), resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))}, false, ErrNoIdentity, "is limited to pods of its own namespace"},
		"binding in another namespace":     {[]any{resolvertest.Identity("i", resolvertest.GUID("C1"), ""), resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))}, false, ErrNoIdentity, "does not exist in the binding's namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHarness(t, Config{Mode: Standard, Namespaced: tc.forced}, tc.objects...).decide(resolvertest.Pod("cart-0", "", "x"))
			for _, want := range []Selector{{}, {ClientID: resolvertest.GUID("c1")}, {ClientID: resolvertest.GUID("C1")}} {
				_, err := p.Identity(want)
				require.ErrorIs(t, err, tc.want)
				assert.ErrorContains(t, err, tc.why)
			}
			_, err := p.Identity(Selector{ClientID: resolvertest.GUID("c2")})
			assert.ErrorIs(t, err, ErrNoIdentity, "it is not pending")
		})
	}
}

func TestRefusalOfAnotherIdentity(t *testing.T) {
	p := newHarness(t, Config{Mode: Standard}, resolvertest.Identity("i", resolvertest.GUID("c1"), ""), resolvertest.Binding("b", "x", "i")).decide(resolvertest.Pod("p", "", "x"))
	_, err := p.Identity(Selector{ClientID: resolvertest.GUID("c2")})
	require.ErrorIs(t, err, ErrNoIdentity)
	assert.NotContains(t, err.Error(), "no AzureIdentityBinding")
}

func TestAssignmentCopiesIdentity(t *testing.T) {
	pod := resolvertest.Pod("p", "", "x")
	h := newHarness(t, Config{Mode: Standard},
		resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("i", resolvertest.GUID("c-then"), ""), resolvertest.Binding("b", "x", "i")))
	for range 2 { // without the objects, then with changed ones
		id, err := h.decide(pod).Identity(Selector{})
		require.NoError(t, err)
		assert.Equal(t, Identity{Namespace: "shop", Name: "i", ClientID: resolvertest.GUID("c-then"), Binding: "b"}, id)
		h.put(resolvertest.Identity("i", resolvertest.GUID("c-now"), ""), resolvertest.Binding("b", "x", "i"))
	}
	_, err := h.decide(pod).Identity(Selector{ClientID: resolvertest.GUID("c-now")})
	require.ErrorIs(t, err, ErrNotAssigned, "MIC will assign the changed one")
	h.put(resolvertest.Assigned("a", "p", "Created", resolvertest.Identity("i", resolvertest.GUID("c-then"), ""), resolvertest.Binding("b", "x", "i")))
	for _, id := range []string{"c-then", "c-now"} {
		_, err = h.decide(pod).Identity(Selector{ClientID: resolvertest.GUID(id)})
		require.ErrorIs(t, err, ErrNotAssigned, id)
	}
}

func TestAssignmentEndsWithLabel(t *testing.T) {
	h := newHarness(t, Config{Mode: Standard}, resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i")))
	for label, why := range map[string]string{
		"y": `AzureAssignedIdentity default/a names AzureIdentity shop/i, which was assigned by the selector "x"`,
		"":  `was assigned by the selector "x"`,
	} {
		_, err := h.decide(resolvertest.Pod("p", "", label)).Identity(Selector{})
		require.ErrorIs(t, err, ErrNoIdentity)
		assert.ErrorContains(t, err, why)
	}
}

func TestAssignmentsInOrderOfBindings(t *testing.T) {
	one := func(name, identityName, bindingName string, age time.Duration) any {
		return resolvertest.Assigned(name, "p", "Assigned", resolvertest.Identity(identityName, resolvertest.GUID(identityName), ""), resolvertest.BindingOfAge(bindingName, "x", identityName, age))
	}
	all := []any{
		one("1", "young", "a", 0), one("2", "old", "z", time.Hour), one("3", "twin-b", "n", time.Minute), one("4", "twin-a", "m", time.Minute),
		one("6", "old", "zz", 0), // by a second binding
	}
	for range len(all) {
		p := newHarness(t, Config{Mode: Standard}, all...).decide(resolvertest.Pod("p", "", "x"))
		assert.Equal(t, []string{"old", "twin-a", "twin-b", "young"}, names(p.identities))
		all = slices.Concat(all[1:], all[:1])
	}
}

func TestAssignmentsInOrderOfNamespaces(t *testing.T) {
	one := func(namespace, id string) any {
		return resolvertest.In(namespace, resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity(id, resolvertest.GUID(id), ""), resolvertest.Binding("b", "x", id)))
	}
	bound := []any{resolvertest.Identity("j", resolvertest.GUID("j"), ""), resolvertest.Binding("b", "x", "j")}
	for _, all := range [][]any{{one("default", "i"), one("shop", "j")}, {one("shop", "j"), one("default", "i")}} {
		p := newHarness(t, Config{Mode: Standard}, append(all, bound...)...).decide(resolvertest.Pod("p", "", "x"))
		assert.Equal(t, []string{"i", "j"}, names(p.identities))
	}
}

// TestAssignmentNamespace: MIC creates assignments in namespace default, and those of namespaced
// identities in the pod's own. Those in other namespaces do not count.
func TestAssignmentNamespace(t *testing.T) {
	b := resolvertest.Binding("b", "x", "i")
	id := func() *azureIdentity {
		return resolvertest.Identity("i", resolvertest.GUID("c1"), resolvertest.ResourceID("1"))
	}
	stolen := func() *azureIdentity { return resolvertest.Identity("i", resolvertest.GUID("kubelet"), "") }
	for name, tc := range map[string]struct {
		assigned *azureAssigned
		bound    []any // to the pod
		want     error
		why      string
	}{
		"namespace default":                     {resolvertest.Assigned("a", "p", "Assigned", id(), b), nil, nil, ""},
		"another namespace":                     {resolvertest.In("evil", resolvertest.Assigned("a", "p", "Assigned", stolen(), b)), nil, ErrNoIdentity, `AzureAssignedIdentity evil/a names AzureIdentity shop/i, which is ignored: assignments in namespace "evil" do not count for this pod`},
		"another one, namespaced":               {resolvertest.In("evil", resolvertest.Assigned("a", "p", "Assigned", resolvertest.With(resolvertest.In("evil", stolen()), behaviour("namespaced")), b)), nil, ErrNoIdentity, "do not count"},
		"another one, of a bound identity":      {resolvertest.In("evil", resolvertest.Assigned("a", "p", "Assigned", id(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"that of MIC itself":                    {resolvertest.In("kube-system", resolvertest.Assigned("a", "p", "Assigned", id(), b)), nil, ErrNoIdentity, "do not count"},
		"the pod's, without a binding":          {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", stolen(), b)), nil, ErrNoIdentity, `no AzureIdentityBinding in namespace "shop" gives the pod with these IDs`},
		"the pod's, with a binding":             {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", id(), b)), []any{id(), b}, nil, ""},
		"the pod's, Created":                    {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Created", id(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, with another client ID":     {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", stolen(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, with another resource ID":   {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("i", resolvertest.GUID("c1"), resolvertest.ResourceID("kubelet")), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, bound by another binding":   {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", id(), nil)), []any{id(), resolvertest.Binding("c", "x", "i")}, nil, ""},
		"the pod's, bound in another namespace": {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", resolvertest.In("bank", id()), nil)), []any{resolvertest.In("bank", id()), resolvertest.In("bank", resolvertest.Binding("b", "x", "i"))}, ErrNotAssigned, "bank/i"},
		"the pod's, of a denied identity":       {resolvertest.In("shop", resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("i", kubeletClient, ""), b)), []any{resolvertest.Identity("i", kubeletClient, ""), b}, ErrNoIdentity, "denied by --deny-identity"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, Config{Mode: Standard, Deny: denyList(t, kubeletClient)}, append(tc.bound, tc.assigned, resolvertest.Pod("p", addr.String(), "x"))...)
			got, err := h.decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
			require.ErrorIs(t, err, tc.want)
			if tc.want == nil {
				assert.Equal(t, Identity{Namespace: "shop", Name: "i", ClientID: resolvertest.GUID("c1"), ResourceID: strings.ToLower(resolvertest.ResourceID("1")), Binding: got.Binding}, got)
				return
			}
			require.ErrorContains(t, err, tc.why)
			if tc.want == ErrNoIdentity { //nolint:errorlint // the table has the error itself
				assert.Contains(t, h.explain(t), tc.why)
			}
		})
	}
	// Ignored assignments do not hide other reasons.
	evil := []any{resolvertest.Binding("b", "x", "gone")}
	for i := range 100 {
		evil = append(evil, resolvertest.In("evil", resolvertest.Assigned(fmt.Sprint("a", i), "p", "Assigned", stolen(), resolvertest.BindingOfAge("0", "x", "i", time.Hour))))
	}
	_, err := newHarness(t, Config{Mode: Standard}, evil...).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.ErrorContains(t, err, `AzureIdentityBinding "b" names AzureIdentity "gone", which does not exist`)
	assert.Less(t, len(err.Error()), 4000)
}

func TestAssignmentMovesToAnotherPod(t *testing.T) {
	a := func(pod string) any {
		return resolvertest.Assigned("a", pod, "Assigned", resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"))
	}
	h := newHarness(t, Config{Mode: Standard}, a("p"), resolvertest.Pod("p", addr.String(), "x"), resolvertest.Pod("q", "10.244.0.8", "x"))
	h.update()
	holds := func(podName string) bool {
		_, err := h.decide(resolvertest.Pod(podName, "", "x")).Identity(Selector{})
		return err == nil
	}
	assert.True(t, holds("p"))
	h.put(a("q"))
	assert.False(t, holds("p"))
	assert.True(t, holds("q"))
	assert.Len(t, h.objects.dirty, 2, "both are decided again")
	h.drop(a("q"))
	assert.False(t, holds("q"))
}
