package podresolver

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestManagedIdentity(t *testing.T) {
	h := newHarness(t, Config{},
		resolvertest.Identity("old", resolvertest.GUID("C-OLD"), resolvertest.ResourceID("/subscriptions/S/old")),
		resolvertest.Identity("new", resolvertest.GUID("c-new"), resolvertest.ResourceID("/subscriptions/s/new")),
		resolvertest.Identity("by-resource", "", resolvertest.ResourceID("/subscriptions/s/by-resource")),
		resolvertest.Identity("empty", "", ""),
		resolvertest.BindingOfAge("b-new", "cart", "new", time.Hour),
		resolvertest.BindingOfAge("a-new-again", "cart", "new", time.Minute),
		resolvertest.BindingOfAge("z-old", "cart", "old", 2*time.Hour),
		resolvertest.Binding("r", "resource", "by-resource"),
		resolvertest.Binding("gone", "broken", "deleted"),
		resolvertest.Binding("none", "broken", "empty"),
		resolvertest.BindingOfAge("half", "half", "deleted", time.Hour),
		resolvertest.Binding("other-half", "half", "new"),
		resolvertest.BindingOfAge("everyone", "", "old", time.Hour),
		resolvertest.BindingOfAge("twin-b", "twins", "old", time.Hour),
		resolvertest.BindingOfAge("twin-a", "twins", "new", time.Hour),
		resolvertest.In("bank", resolvertest.Identity("vault", resolvertest.GUID("c-vault"), "")),
		resolvertest.In("bank", resolvertest.BindingOfAge("vault", "cart", "vault", 9*time.Hour)),
		resolvertest.In("bank", resolvertest.Binding("bank-only", "bank-only", "vault")),
		resolvertest.Binding("abroad", "abroad", "vault"),
	)
	for name, tc := range map[string]struct {
		label string
		want  Selector
		gets  string // name of an identity; "" for an error
		why   string // part of the error
	}{
		"no selector, oldest binding":           {"cart", Selector{}, "old", ""},
		"no selector, bindings of the same age": {"twins", Selector{}, "new", ""},
		"client ID":                             {"cart", Selector{ClientID: resolvertest.GUID("c-new")}, "new", ""},
		"client ID in another case":             {"cart", Selector{ClientID: resolvertest.GUID("c-OLD")}, "old", ""},
		"resource ID in another case":           {"cart", Selector{ResourceID: resolvertest.ResourceID("/SUBSCRIPTIONS/s/New")}, "new", ""},
		"client ID that is not bound":           {"resource", Selector{ClientID: resolvertest.GUID("c-old")}, "", "none of those bound to it"},
		"an empty client ID is not a wildcard":  {"resource", Selector{ResourceID: resolvertest.ResourceID("/other")}, "", "none of those bound to it"},
		"object ID alone":                       {"cart", Selector{ObjectID: "o"}, "", "none of those bound to it"},
		"object ID beside a client ID":          {"cart", Selector{ClientID: resolvertest.GUID("c-new"), ObjectID: "o"}, "", "none of those bound to it"},
		"identity with a resource ID alone":     {"resource", Selector{}, "by-resource", ""},
		"selector differs in case":              {"Cart", Selector{}, "", `no AzureIdentityBinding in namespace "shop" has the selector "Cart"`},
		"no label":                              {"", Selector{}, "", `it has no label "aadpodidbinding"`},
		"binding of a missing identity":         {"broken", Selector{}, "", `AzureIdentityBinding "gone" names AzureIdentity "deleted", which does not exist in the binding's namespace`},
		"binding of an identity without IDs":    {"broken", Selector{}, "", `AzureIdentity "empty", which has neither clientID nor resourceID`},
		"one of two bindings is unusable":       {"half", Selector{}, "new", ""},
		"binding in another namespace":          {"bank-only", Selector{}, "", `in namespace "shop" has the selector "bank-only"`},
		"identity in another namespace":         {"abroad", Selector{}, "", `AzureIdentity "vault", which does not exist`},
		"client ID bound in another namespace":  {"cart", Selector{ClientID: resolvertest.GUID("c-vault")}, "", "none of those bound to it"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := h.decide(resolvertest.Pod("cart-0", "", tc.label)).Identity(tc.want)
			if tc.gets == "" {
				require.ErrorIs(t, err, ErrNoIdentity)
				assert.ErrorContains(t, err, tc.why)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.gets, got.Name)
		})
	}
}

func TestTwoBindingsOfOneIdentity(t *testing.T) {
	p := newHarness(t, Config{}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.BindingOfAge("b", "x", "i", time.Hour), resolvertest.Binding("a", "x", "i")).decide(resolvertest.Pod("p", "", "x"))
	require.Len(t, p.identities, 1)
	assert.Equal(t, "b", p.identities[0].Binding, "of the older binding")
}

func TestOrderOfEventsDoesNotMatter(t *testing.T) {
	all := []any{
		resolvertest.Identity("i", resolvertest.GUID("c1"), ""), resolvertest.Identity("j", resolvertest.GUID("c2"), ""), resolvertest.Identity("k", resolvertest.GUID("c3"), ""),
		resolvertest.Binding("b", "x", "i"), resolvertest.Binding("a", "x", "j"), resolvertest.BindingOfAge("z", "x", "k", time.Second),
	}
	for range len(all) {
		p := newHarness(t, Config{}, all...).decide(resolvertest.Pod("p", "", "x"))
		assert.Equal(t, []string{"k", "j", "i"}, names(p.identities))
		all = slices.Concat(all[1:], all[:1])
	}
}

func TestStrictSelection(t *testing.T) {
	h := newHarness(t, Config{StrictSelection: true},
		resolvertest.Identity("i", resolvertest.GUID("c1"), ""), resolvertest.Identity("j", resolvertest.GUID("c2"), ""),
		resolvertest.Binding("a", "two", "i"), resolvertest.Binding("b", "two", "j"), resolvertest.Binding("c", "one", "i"))
	_, err := h.decide(resolvertest.Pod("p", "", "two")).Identity(Selector{})
	require.ErrorIs(t, err, ErrMultipleIdentities)
	got, err := h.decide(resolvertest.Pod("p", "", "two")).Identity(Selector{ClientID: resolvertest.GUID("C2")})
	require.NoError(t, err)
	assert.Equal(t, "j", got.Name)
	got, err = h.decide(resolvertest.Pod("p", "", "one")).Identity(Selector{})
	require.NoError(t, err, "it has only one")
	assert.Equal(t, "i", got.Name)
}

func TestEmptySelectorMatchesNoPod(t *testing.T) {
	pod := resolvertest.Pod("p", "", "")
	pod.Labels = map[string]string{aadpodidentity.BindingLabel: ""}
	for _, mode := range []Mode{Managed, Standard} {
		p := newHarness(t, Config{Mode: mode}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("a", "", "i")).decide(pod)
		_, err := p.Identity(Selector{})
		assert.ErrorIs(t, err, ErrNoIdentity)
	}
}

func TestMalformedIdentity(t *testing.T) {
	odd := resolvertest.Identity("odd", "", "")
	odd.Spec.Unreadable = "type: not a number"
	_, err := newHarness(t, Config{}, odd, resolvertest.Binding("b", "x", "odd")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.ErrorIs(t, err, ErrNoIdentity)
	assert.ErrorContains(t, err, `AzureIdentity "odd", which is malformed: type: not a number`)
}

func TestIdentityOfServicePrincipal(t *testing.T) {
	sp := resolvertest.Identity("sp", resolvertest.GUID("C1"), resolvertest.ResourceID("/R/1"))
	sp.Spec.Type = aadpodidentity.ServicePrincipal
	sp.Spec.TenantID, sp.Spec.ClientPassword.Name = "t", "s"
	id, err := newHarness(t, Config{}, sp, resolvertest.Binding("b", "x", "sp")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.NoError(t, err)
	assert.Equal(t, Identity{
		Namespace: "shop", Name: "sp", Type: aadpodidentity.ServicePrincipal,
		ClientID: resolvertest.GUID("c1"), ResourceID: strings.ToLower(resolvertest.ResourceID("/r/1")), Binding: "b",
		Principal: &Principal{TenantID: "t", Authority: defaultAuthority, SecretNamespace: "shop", SecretName: "s"},
	}, id)
}
