package podresolver

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

func TestManagedIdentity(t *testing.T) {
	h := newHarness(t, Config{},
		identity("old", guid("C-OLD"), path("/subscriptions/S/old")),
		identity("new", guid("c-new"), path("/subscriptions/s/new")),
		identity("by-resource", "", path("/subscriptions/s/by-resource")),
		identity("empty", "", ""),
		binding("b-new", "cart", "new", time.Hour),
		binding("a-new-again", "cart", "new", time.Minute),
		binding("z-old", "cart", "old", 2*time.Hour),
		binding("r", "resource", "by-resource", 0),
		binding("gone", "broken", "deleted", 0),
		binding("none", "broken", "empty", 0),
		binding("half", "half", "deleted", time.Hour),
		binding("other-half", "half", "new", 0),
		binding("everyone", "", "old", time.Hour),
		binding("twin-b", "twins", "old", time.Hour),
		binding("twin-a", "twins", "new", time.Hour),
		in("bank", identity("vault", guid("c-vault"), "")),
		in("bank", binding("vault", "cart", "vault", 9*time.Hour)),
		in("bank", binding("bank-only", "bank-only", "vault", 0)),
		binding("abroad", "abroad", "vault", 0),
	)
	for name, tc := range map[string]struct {
		label string
		want  Selector
		gets  string // name of an identity; "" for an error
		why   string // part of the error
	}{
		"no selector, oldest binding":           {"cart", Selector{}, "old", ""},
		"no selector, bindings of the same age": {"twins", Selector{}, "new", ""},
		"client ID":                             {"cart", Selector{ClientID: guid("c-new")}, "new", ""},
		"client ID in another case":             {"cart", Selector{ClientID: guid("c-OLD")}, "old", ""},
		"resource ID in another case":           {"cart", Selector{ResourceID: path("/SUBSCRIPTIONS/s/New")}, "new", ""},
		"client ID that is not bound":           {"resource", Selector{ClientID: guid("c-old")}, "", "none of those bound to it"},
		"an empty client ID is not a wildcard":  {"resource", Selector{ResourceID: path("/other")}, "", "none of those bound to it"},
		"object ID alone":                       {"cart", Selector{ObjectID: "o"}, "", "none of those bound to it"},
		"object ID beside a client ID":          {"cart", Selector{ClientID: guid("c-new"), ObjectID: "o"}, "", "none of those bound to it"},
		"identity with a resource ID alone":     {"resource", Selector{}, "by-resource", ""},
		"selector differs in case":              {"Cart", Selector{}, "", `no AzureIdentityBinding in namespace "shop" has the selector "Cart"`},
		"no label":                              {"", Selector{}, "", `it has no label "aadpodidbinding"`},
		"binding of a missing identity":         {"broken", Selector{}, "", `AzureIdentityBinding "gone" names AzureIdentity "deleted", which does not exist in the binding's namespace`},
		"binding of an identity without IDs":    {"broken", Selector{}, "", `AzureIdentity "empty", which has neither clientID nor resourceID`},
		"one of two bindings is unusable":       {"half", Selector{}, "new", ""},
		"binding in another namespace":          {"bank-only", Selector{}, "", `in namespace "shop" has the selector "bank-only"`},
		"identity in another namespace":         {"abroad", Selector{}, "", `AzureIdentity "vault", which does not exist`},
		"client ID bound in another namespace":  {"cart", Selector{ClientID: guid("c-vault")}, "", "none of those bound to it"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := h.decide(newPod("cart-0", "", tc.label)).Identity(tc.want)
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
	p := newHarness(t, Config{}, identity("i", guid("c"), ""), binding("b", "x", "i", time.Hour), binding("a", "x", "i", 0)).decide(newPod("p", "", "x"))
	require.Len(t, p.identities, 1)
	assert.Equal(t, "b", p.identities[0].Binding, "of the older binding")
}

func TestOrderOfEventsDoesNotMatter(t *testing.T) {
	all := []any{
		identity("i", guid("c1"), ""), identity("j", guid("c2"), ""), identity("k", guid("c3"), ""),
		binding("b", "x", "i", 0), binding("a", "x", "j", 0), binding("z", "x", "k", time.Second),
	}
	for range len(all) {
		p := newHarness(t, Config{}, all...).decide(newPod("p", "", "x"))
		assert.Equal(t, []string{"k", "j", "i"}, names(p.identities))
		all = slices.Concat(all[1:], all[:1])
	}
}

func TestStrictSelection(t *testing.T) {
	h := newHarness(t, Config{StrictSelection: true},
		identity("i", guid("c1"), ""), identity("j", guid("c2"), ""),
		binding("a", "two", "i", 0), binding("b", "two", "j", 0), binding("c", "one", "i", 0))
	_, err := h.decide(newPod("p", "", "two")).Identity(Selector{})
	require.ErrorIs(t, err, ErrMultipleIdentities)
	got, err := h.decide(newPod("p", "", "two")).Identity(Selector{ClientID: guid("C2")})
	require.NoError(t, err)
	assert.Equal(t, "j", got.Name)
	got, err = h.decide(newPod("p", "", "one")).Identity(Selector{})
	require.NoError(t, err, "it has only one")
	assert.Equal(t, "i", got.Name)
}

func TestEmptySelectorMatchesNoPod(t *testing.T) {
	pod := newPod("p", "", "")
	pod.Labels = map[string]string{aadpodidentity.BindingLabel: ""}
	for _, mode := range []Mode{Managed, Standard} {
		p := newHarness(t, Config{Mode: mode}, identity("i", guid("c"), ""), binding("a", "", "i", 0)).decide(pod)
		_, err := p.Identity(Selector{})
		assert.ErrorIs(t, err, ErrNoIdentity)
	}
}

func TestMalformedIdentity(t *testing.T) {
	odd := identity("odd", "", "")
	odd.Spec.Unreadable = "type: not a number"
	_, err := newHarness(t, Config{}, odd, binding("b", "x", "odd", 0)).decide(newPod("p", "", "x")).Identity(Selector{})
	require.ErrorIs(t, err, ErrNoIdentity)
	assert.ErrorContains(t, err, `AzureIdentity "odd", which is malformed: type: not a number`)
}

func TestIdentityOfServicePrincipal(t *testing.T) {
	sp := identity("sp", guid("C1"), path("/R/1"))
	sp.Spec.Type = aadpodidentity.ServicePrincipal
	sp.Spec.TenantID, sp.Spec.ClientPassword.Name = "t", "s"
	id, err := newHarness(t, Config{}, sp, binding("b", "x", "sp", 0)).decide(newPod("p", "", "x")).Identity(Selector{})
	require.NoError(t, err)
	assert.Equal(t, Identity{
		Namespace: "shop", Name: "sp", Type: aadpodidentity.ServicePrincipal,
		ClientID: guid("c1"), ResourceID: strings.ToLower(path("/r/1")), Binding: "b",
		Principal: &Principal{TenantID: "t", Authority: defaultAuthority, SecretNamespace: "shop", SecretName: "s"},
	}, id)
}
