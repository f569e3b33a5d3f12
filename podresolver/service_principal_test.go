package podresolver

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// principal is a service principal with a changed spec.
func principal(change func(*aadpodidentity.AzureIdentitySpec)) *aadpodidentity.AzureIdentity {
	id := resolvertest.Identity("sp", resolvertest.GUID("C1"), "")
	id.Spec.Type, id.Spec.TenantID = aadpodidentity.ServicePrincipal, "t"
	id.Spec.ClientPassword.Name = "s"
	change(&id.Spec)
	return id
}

func TestUnusableServicePrincipal(t *testing.T) {
	tenants := make([]string, 11)
	for i := range tenants {
		tenants[i] = fmt.Sprint("t", i)
	}
	for name, tc := range map[string]struct {
		change func(*aadpodidentity.AzureIdentitySpec)
		why    string // part of the error
	}{
		"no clientID":      {func(s *aadpodidentity.AzureIdentitySpec) { s.ClientID, s.ResourceID = "", "/r" }, "has no clientID"},
		"no tenantID":      {func(s *aadpodidentity.AzureIdentitySpec) { s.TenantID = "" }, "has no tenantID"},
		"no secret":        {func(s *aadpodidentity.AzureIdentitySpec) { s.ClientPassword.Name = "" }, "has no secret name in clientPassword"},
		"too many tenants": {func(s *aadpodidentity.AzureIdentitySpec) { s.AuxiliaryTenantIDs = tenants }, "has 11 auxiliaryTenantIDs, more than 10"},
		"an unknown type":  {func(s *aadpodidentity.AzureIdentitySpec) { s.Type = 7 }, "has the unknown type 7"},
		"a negative type":  {func(s *aadpodidentity.AzureIdentitySpec) { s.Type = -1 }, "has the unknown type -1"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, mode := range []Mode{Managed, Standard} {
				h := newHarness(t, Config{Mode: mode}, principal(tc.change), resolvertest.Binding("b", "x", "sp"))
				pod := resolvertest.Pod("p", addr.String(), "x")
				_, err := h.decide(pod).Identity(Selector{})
				require.ErrorIs(t, err, ErrNoIdentity)
				assert.ErrorContains(t, err, `AzureIdentity "sp", which `+tc.why)
				h.put(pod)
				assert.Contains(t, h.explain(t), tc.why)
			}
		})
	}
}

func TestPrincipal(t *testing.T) {
	id := principal(func(s *aadpodidentity.AzureIdentitySpec) {
		s.Type = aadpodidentity.ServicePrincipalCertificate
		s.ADEndpoint = " https://login.microsoftonline.us/\n"
		s.TenantID, s.ClientID, s.ClientPassword.Name = " t\t", " "+s.ClientID+"\n", "s\n"
		s.AuxiliaryTenantIDs = []string{"a", "", " t", "b\n", "a", " "}
	})
	assert.Equal(t, &Principal{
		TenantID: "t", AuxiliaryTenantIDs: []string{"a", "b"}, Authority: "https://login.microsoftonline.us",
		SecretNamespace: "shop", SecretName: "s", Certificate: true,
	}, newIdentityInfo(id).principal)
	assert.Nil(t, newIdentityInfo(resolvertest.Identity("i", resolvertest.GUID("c"), "")).principal, "a managed identity")

	got, err := newHarness(t, Config{}, id, resolvertest.Binding("b", "x", "sp")).decide(resolvertest.Pod("p", "", "x")).Identity(Selector{ClientID: resolvertest.GUID("c1")})
	require.NoError(t, err)
	assert.Equal(t, "AzureIdentity shop/sp (service principal with certificate, client ID "+resolvertest.GUID("c1")+", tenant t, secret shop/s)", got.String())
}

// TestSecretNamespace: only an AzureIdentity that pods of all namespaces may use can name a
// secret in another namespace.
func TestSecretNamespace(t *testing.T) {
	abroad := principal(func(s *aadpodidentity.AzureIdentitySpec) { s.ClientPassword.Namespace = "vault" })
	annotated := abroad.DeepCopyObject().(*aadpodidentity.AzureIdentity)
	annotated.Annotations = map[string]string{aadpodidentity.BehaviorAnnotation: aadpodidentity.BehaviorNamespaced}
	home := principal(func(s *aadpodidentity.AzureIdentitySpec) { s.ClientPassword.Namespace = "shop" })
	for name, tc := range map[string]struct {
		cfg     Config
		id      *aadpodidentity.AzureIdentity
		refused bool
	}{
		"managed":                       {Config{Mode: Managed}, abroad, true},
		"standard":                      {Config{Mode: Standard}, abroad, false},
		"standard, all namespaced":      {Config{Mode: Standard, Namespaced: true}, abroad, true},
		"standard, this one namespaced": {Config{Mode: Standard}, annotated, true},
		"managed, its own":              {Config{Mode: Managed}, home, false},
		"namespaced, its own":           {Config{Mode: Standard, Namespaced: true}, home, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := resolvertest.Binding("b", "x", "sp")
			h := newHarness(t, tc.cfg, tc.id, b)
			if tc.cfg.Mode == Standard {
				h.put(resolvertest.Assigned("a", "p", aadpodidentity.Assigned, tc.id, b))
			}
			got, err := h.decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
			if tc.refused {
				require.ErrorIs(t, err, ErrNoIdentity)
				assert.ErrorContains(t, err, `names a secret in namespace "vault"`)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, "s", got.Principal.SecretName)
		})
	}
}
