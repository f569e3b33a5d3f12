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
		id     = func() *azureIdentity { return identity("i", guid("C1"), path("/R/1")) }
		b      = binding("b", "x", "i", 0)
		abroad = in("bank", id())
	)
	for name, tc := range map[string]struct {
		assigned *azureAssigned
		forced   bool // Config.Namespaced
		want     error
	}{
		"that is Assigned":                   {assigned("a", "cart-0", "Assigned", id(), b), false, nil},
		"that has no state":                  {assigned("a", "cart-0", "", id(), b), false, nil},
		"that is Created":                    {assigned("a", "cart-0", "Created", id(), b), false, ErrNotAssigned},
		"that is Unassigned":                 {assigned("a", "cart-0", "Unassigned", id(), b), false, ErrNoIdentity},
		"in an unknown state":                {assigned("a", "cart-0", "assigned", id(), b), false, ErrNoIdentity},
		"to another pod":                     {assigned("a", "cart-1", "Assigned", id(), b), false, ErrNoIdentity},
		"to a pod of another namespace":      {with(assigned("a", "cart-0", "Assigned", id(), b), func(a *azureAssigned) { a.Spec.PodNamespace = "bank" }), false, ErrNoIdentity},
		"to a pod of another node":           {with(assigned("a", "cart-0", "Assigned", id(), b), func(a *azureAssigned) { a.Spec.NodeName = "node2" }), false, ErrNoIdentity},
		"without an identity":                {assigned("a", "cart-0", "Assigned", nil, b), false, ErrNoIdentity},
		"without a binding":                  {assigned("a", "cart-0", "Assigned", id(), nil), false, nil},
		"of an identity without IDs":         {assigned("a", "cart-0", "Assigned", identity("i", "", ""), b), false, ErrNoIdentity},
		"by another label":                   {assigned("a", "cart-0", "Assigned", id(), binding("b", "y", "i", 0)), false, ErrNoIdentity},
		"by a label in another case":         {assigned("a", "cart-0", "Assigned", id(), binding("b", "X", "i", 0)), false, ErrNoIdentity},
		"of the pod's namespace":             {assigned("a", "cart-0", "Assigned", id(), b), true, nil},
		"of another namespace":               {assigned("a", "cart-0", "Assigned", abroad, in("bank", binding("b", "x", "i", 0))), false, nil},
		"of another namespace, forced":       {assigned("a", "cart-0", "Assigned", abroad, in("bank", binding("b", "x", "i", 0))), true, ErrNoIdentity},
		"of another namespace, annotated":    {assigned("a", "cart-0", "Assigned", with(in("bank", id()), behaviour("namespaced")), b), false, ErrNoIdentity},
		"of another one, in another case":    {assigned("a", "cart-0", "Assigned", with(in("bank", id()), behaviour("Namespaced")), b), false, ErrNoIdentity},
		"of another one, otherwise":          {assigned("a", "cart-0", "Assigned", with(in("bank", id()), behaviour("clustered")), b), false, nil},
		"of the pod's namespace, annotated":  {assigned("a", "cart-0", "Assigned", with(id(), behaviour("namespaced")), b), false, nil},
		"Created, of another one, annotated": {assigned("a", "cart-0", "Created", with(in("bank", id()), behaviour("namespaced")), b), false, ErrNoIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHarness(t, Config{Mode: Standard, Namespaced: tc.forced}, tc.assigned).decide(newPod("cart-0", "", "x"))
			for _, want := range []Selector{{}, {ClientID: guid("c1")}, {ClientID: guid("C1")}, {ResourceID: path("/r/1")}, {ResourceID: path("/R/1")}} {
				got, err := p.Identity(want)
				require.ErrorIs(t, err, tc.want)
				if tc.want == nil {
					assert.Equal(t, "i", got.Name)
					assert.Equal(t, guid("c1"), got.ClientID)
				}
			}
			_, err := p.Identity(Selector{ClientID: guid("c2")})
			require.ErrorIs(t, err, ErrNoIdentity)
			_, err = p.Identity(Selector{ObjectID: "c1"})
			require.ErrorIs(t, err, ErrNoIdentity)
		})
	}
}

func TestManagedModeIgnoresAssignments(t *testing.T) {
	p := newHarness(t, Config{}, assigned("a", "p", "Assigned", identity("i", guid("c"), ""), nil)).decide(newPod("p", "", "x"))
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
		"one of the pod's namespace":       {[]any{identity("i", guid("C1"), ""), binding("b", "x", "i", 0)}, false, ErrNotAssigned, "shop/i"},
		"one of another selector":          {[]any{identity("i", guid("C1"), ""), binding("b", "y", "i", 0)}, false, ErrNoIdentity, ""},
		"one whose identity is missing":    {[]any{binding("b", "x", "i", 0)}, false, ErrNoIdentity, "does not exist"},
		"one of another namespace":         {[]any{in("bank", identity("i", guid("C1"), "")), in("bank", binding("b", "x", "i", 0))}, false, ErrNotAssigned, "bank/i"},
		"one of another namespace, forced": {[]any{in("bank", identity("i", guid("C1"), "")), in("bank", binding("b", "x", "i", 0))}, true, ErrNoIdentity, ""},
		"one of another, annotated":        {[]any{with(in("bank", identity("i", guid("C1"), "")), behaviour("namespaced")), in("bank", binding("b", "x", "i", 0))}, false, ErrNoIdentity, "is limited to pods of its own namespace"},
		"binding in another namespace":     {[]any{identity("i", guid("C1"), ""), in("bank", binding("b", "x", "i", 0))}, false, ErrNoIdentity, "does not exist in the binding's namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newHarness(t, Config{Mode: Standard, Namespaced: tc.forced}, tc.objects...).decide(newPod("cart-0", "", "x"))
			for _, want := range []Selector{{}, {ClientID: guid("c1")}, {ClientID: guid("C1")}} {
				_, err := p.Identity(want)
				require.ErrorIs(t, err, tc.want)
				assert.ErrorContains(t, err, tc.why)
			}
			_, err := p.Identity(Selector{ClientID: guid("c2")})
			assert.ErrorIs(t, err, ErrNoIdentity, "it is not pending")
		})
	}
}

func TestRefusalOfAnotherIdentity(t *testing.T) {
	p := newHarness(t, Config{Mode: Standard}, identity("i", guid("c1"), ""), binding("b", "x", "i", 0)).decide(newPod("p", "", "x"))
	_, err := p.Identity(Selector{ClientID: guid("c2")})
	require.ErrorIs(t, err, ErrNoIdentity)
	assert.NotContains(t, err.Error(), "no AzureIdentityBinding")
}

func TestAssignmentCopiesIdentity(t *testing.T) {
	pod := newPod("p", "", "x")
	h := newHarness(t, Config{Mode: Standard},
		assigned("a", "p", "Assigned", identity("i", guid("c-then"), ""), binding("b", "x", "i", 0)))
	for range 2 { // without the objects, then with changed ones
		id, err := h.decide(pod).Identity(Selector{})
		require.NoError(t, err)
		assert.Equal(t, Identity{Namespace: "shop", Name: "i", ClientID: guid("c-then"), Binding: "b"}, id)
		h.put(identity("i", guid("c-now"), ""), binding("b", "x", "i", 0))
	}
	_, err := h.decide(pod).Identity(Selector{ClientID: guid("c-now")})
	require.ErrorIs(t, err, ErrNotAssigned, "MIC will assign the changed one")
	h.put(assigned("a", "p", "Created", identity("i", guid("c-then"), ""), binding("b", "x", "i", 0)))
	for _, id := range []string{"c-then", "c-now"} {
		_, err = h.decide(pod).Identity(Selector{ClientID: guid(id)})
		require.ErrorIs(t, err, ErrNotAssigned, id)
	}
}

func TestAssignmentEndsWithLabel(t *testing.T) {
	h := newHarness(t, Config{Mode: Standard}, assigned("a", "p", "Assigned", identity("i", guid("c"), ""), binding("b", "x", "i", 0)))
	for label, why := range map[string]string{
		"y": `AzureAssignedIdentity default/a names AzureIdentity shop/i, which was assigned by the selector "x"`,
		"":  `was assigned by the selector "x"`,
	} {
		_, err := h.decide(newPod("p", "", label)).Identity(Selector{})
		require.ErrorIs(t, err, ErrNoIdentity)
		assert.ErrorContains(t, err, why)
	}
}

func TestAssignmentsInOrderOfBindings(t *testing.T) {
	one := func(name, identityName, bindingName string, age time.Duration) any {
		return assigned(name, "p", "Assigned", identity(identityName, guid(identityName), ""), binding(bindingName, "x", identityName, age))
	}
	all := []any{
		one("1", "young", "a", 0), one("2", "old", "z", time.Hour), one("3", "twin-b", "n", time.Minute), one("4", "twin-a", "m", time.Minute),
		one("6", "old", "zz", 0), // by a second binding
	}
	for range len(all) {
		p := newHarness(t, Config{Mode: Standard}, all...).decide(newPod("p", "", "x"))
		assert.Equal(t, []string{"old", "twin-a", "twin-b", "young"}, names(p.identities))
		all = slices.Concat(all[1:], all[:1])
	}
}

func TestAssignmentsInOrderOfNamespaces(t *testing.T) {
	one := func(namespace, id string) any {
		return in(namespace, assigned("a", "p", "Assigned", identity(id, guid(id), ""), binding("b", "x", id, 0)))
	}
	bound := []any{identity("j", guid("j"), ""), binding("b", "x", "j", 0)}
	for _, all := range [][]any{{one("default", "i"), one("shop", "j")}, {one("shop", "j"), one("default", "i")}} {
		p := newHarness(t, Config{Mode: Standard}, append(all, bound...)...).decide(newPod("p", "", "x"))
		assert.Equal(t, []string{"i", "j"}, names(p.identities))
	}
}

// TestAssignmentNamespace: MIC creates assignments in namespace default, and those of namespaced
// identities in the pod's own. Those in other namespaces do not count.
func TestAssignmentNamespace(t *testing.T) {
	b := binding("b", "x", "i", 0)
	id := func() *azureIdentity { return identity("i", guid("c1"), path("1")) }
	stolen := func() *azureIdentity { return identity("i", guid("kubelet"), "") }
	for name, tc := range map[string]struct {
		assigned *azureAssigned
		bound    []any // to the pod
		want     error
		why      string
	}{
		"namespace default":                     {assigned("a", "p", "Assigned", id(), b), nil, nil, ""},
		"another namespace":                     {in("evil", assigned("a", "p", "Assigned", stolen(), b)), nil, ErrNoIdentity, `AzureAssignedIdentity evil/a names AzureIdentity shop/i, which is ignored: assignments in namespace "evil" do not count for this pod`},
		"another one, namespaced":               {in("evil", assigned("a", "p", "Assigned", with(in("evil", stolen()), behaviour("namespaced")), b)), nil, ErrNoIdentity, "do not count"},
		"another one, of a bound identity":      {in("evil", assigned("a", "p", "Assigned", id(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"that of MIC itself":                    {in("kube-system", assigned("a", "p", "Assigned", id(), b)), nil, ErrNoIdentity, "do not count"},
		"the pod's, without a binding":          {in("shop", assigned("a", "p", "Assigned", stolen(), b)), nil, ErrNoIdentity, `no AzureIdentityBinding in namespace "shop" gives the pod with these IDs`},
		"the pod's, with a binding":             {in("shop", assigned("a", "p", "Assigned", id(), b)), []any{id(), b}, nil, ""},
		"the pod's, Created":                    {in("shop", assigned("a", "p", "Created", id(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, with another client ID":     {in("shop", assigned("a", "p", "Assigned", stolen(), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, with another resource ID":   {in("shop", assigned("a", "p", "Assigned", identity("i", guid("c1"), path("kubelet")), b)), []any{id(), b}, ErrNotAssigned, "shop/i"},
		"the pod's, bound by another binding":   {in("shop", assigned("a", "p", "Assigned", id(), nil)), []any{id(), binding("c", "x", "i", 0)}, nil, ""},
		"the pod's, bound in another namespace": {in("shop", assigned("a", "p", "Assigned", in("bank", id()), nil)), []any{in("bank", id()), in("bank", binding("b", "x", "i", 0))}, ErrNotAssigned, "bank/i"},
		"the pod's, of a denied identity":       {in("shop", assigned("a", "p", "Assigned", identity("i", kubeletClient, ""), b)), []any{identity("i", kubeletClient, ""), b}, ErrNoIdentity, "denied by --deny-identity"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, Config{Mode: Standard, Deny: denyList(t, kubeletClient)}, append(tc.bound, tc.assigned, newPod("p", addr.String(), "x"))...)
			got, err := h.decide(newPod("p", "", "x")).Identity(Selector{})
			require.ErrorIs(t, err, tc.want)
			if tc.want == nil {
				assert.Equal(t, Identity{Namespace: "shop", Name: "i", ClientID: guid("c1"), ResourceID: strings.ToLower(path("1")), Binding: got.Binding}, got)
				return
			}
			require.ErrorContains(t, err, tc.why)
			if tc.want == ErrNoIdentity { //nolint:errorlint // the table has the error itself
				assert.Contains(t, h.explain(t), tc.why)
			}
		})
	}
	// Ignored assignments do not hide other reasons.
	evil := []any{binding("b", "x", "gone", 0)}
	for i := range 100 {
		evil = append(evil, in("evil", assigned(fmt.Sprint("a", i), "p", "Assigned", stolen(), binding("0", "x", "i", time.Hour))))
	}
	_, err := newHarness(t, Config{Mode: Standard}, evil...).decide(newPod("p", "", "x")).Identity(Selector{})
	require.ErrorContains(t, err, `AzureIdentityBinding "b" names AzureIdentity "gone", which does not exist`)
	assert.Less(t, len(err.Error()), 4000)
}

func TestAssignmentMovesToAnotherPod(t *testing.T) {
	a := func(pod string) any {
		return assigned("a", pod, "Assigned", identity("i", guid("c"), ""), binding("b", "x", "i", 0))
	}
	h := newHarness(t, Config{Mode: Standard}, a("p"), newPod("p", addr.String(), "x"), newPod("q", "10.244.0.8", "x"))
	h.update()
	holds := func(podName string) bool {
		_, err := h.decide(newPod(podName, "", "x")).Identity(Selector{})
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
