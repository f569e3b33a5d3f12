//go:build e2e

package e2e

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	shared   = "5ba4ed00-0000-4000-8000-000000000004"
	unlisted = "0b57ac1e-0000-4000-8000-000000000005"
)

// allowedIdentities is the list of deploy/admission: cart in namespace shop by both
// IDs, report in bank by client ID, and one identity everywhere.
var allowedIdentities = map[string]any{
	"shop":            "# cart\n  " + strings.ToUpper(cart.ClientID) + "\r\n" + cart.ResourceID + "\n# not yet: " + third.ClientID + "\n\n",
	"bank":            report.ClientID,
	"_all-namespaces": shared,
}

func (c *admissionCluster) testAllowedIdentities(t *testing.T) {
	principal := func(clientID string) map[string]any {
		return map[string]any{"type": int64(1), "clientID": clientID, "tenantID": unlisted, "clientPassword": map[string]any{"name": "s"}}
	}
	for name, tc := range map[string]struct {
		namespace string
		spec      map[string]any
		refused   string // the IDs that the message names; "" if it is allowed
	}{
		"both IDs":                              {"shop", managedSpec(cart.ClientID, cart.ResourceID), ""},
		"client ID":                             {"shop", managedSpec(cart.ClientID, ""), ""},
		"resource ID":                           {"shop", managedSpec("", cart.ResourceID), ""},
		"another case":                          {"shop", managedSpec(strings.ToUpper(cart.ClientID), strings.ToUpper(cart.ResourceID)), ""},
		"white space":                           {"shop", managedSpec(" "+cart.ClientID+"\n", ""), ""},
		"in all namespaces":                     {"shop", managedSpec(shared, ""), ""},
		"of its namespace's list":               {"bank", managedSpec(report.ClientID, ""), ""},
		"neither ID, which gives nothing":       {"shop", managedSpec("", ""), ""},
		"service principal":                     {"shop", principal(cart.ClientID), ""},
		"unlisted client ID":                    {"shop", managedSpec(unlisted, ""), unlisted},
		"unlisted client ID, listed resource":   {"shop", managedSpec(unlisted, cart.ResourceID), unlisted},
		"unlisted resource ID":                  {"shop", managedSpec("", report.ResourceID), report.ResourceID},
		"unlisted resource ID, listed client":   {"shop", managedSpec(cart.ClientID, report.ResourceID), report.ResourceID},
		"two unlisted IDs":                      {"shop", managedSpec(unlisted, report.ResourceID), unlisted + ", " + report.ResourceID},
		"of another namespace's list":           {"bank", managedSpec(cart.ClientID, ""), cart.ClientID},
		"in a comment":                          {"shop", managedSpec(third.ClientID, ""), third.ClientID},
		"a comment":                             {"shop", managedSpec("# cart", ""), "# cart"},
		"the start of a line":                   {"shop", managedSpec(cart.ClientID[:8], ""), cart.ClientID[:8]},
		"two lines":                             {"bank", managedSpec(report.ClientID+"\n"+shared, ""), report.ClientID + " " + shared},
		"namespace without a list":              {"kube-system", managedSpec(cart.ClientID, ""), cart.ClientID},
		"namespace without a list, but for all": {"kube-system", managedSpec(shared, ""), ""},
		"unlisted service principal":            {"shop", principal(unlisted), unlisted},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.admin.dryRun(newIdentity(tc.namespace, "new", tc.spec))
			if tc.refused == "" {
				require.NoError(t, err)
				return
			}
			refused(t, err, "nmi-allowed-identities", "not allowed in namespace "+tc.namespace+": "+tc.refused, "ConfigMap nmi-allowed-identities in namespace kube-system")
		})
	}

	t.Run("update", func(t *testing.T) {
		stored := newIdentity("shop", "stored", managedSpec(cart.ClientID, ""))
		require.NoError(t, c.bob.create(stored))
		refused(t, c.bob.patch(stored, `{"spec":{"clientID":"`+unlisted+`"}}`), "nmi-allowed-identities")
		refused(t, c.bob.patch(stored, `{"spec":{"resourceID":"`+report.ResourceID+`"}}`), "nmi-allowed-identities")
		require.NoError(t, c.bob.patch(stored, `{"spec":{"resourceID":"`+cart.ResourceID+`"}}`))

		old := newIdentity("shop", "old-unlisted", nil)
		require.NoError(t, c.bob.patch(old, `{"metadata":{"annotations":{"note":"x"},"finalizers":["example.com/x"]},"spec":{"tenantID":"t"}}`))
		require.NoError(t, c.bob.patch(old, `{"metadata":{"finalizers":null}}`))
		refused(t, c.bob.patch(old, `{"spec":{"type":1}}`), "nmi-allowed-identities")
		refused(t, c.bob.patch(old, `{"spec":{"resourceID":"`+cart.ResourceID+`"}}`), "nmi-allowed-identities", unlisted)
		require.NoError(t, c.bob.remove(old))
	})

	t.Run("list", func(t *testing.T) {
		lists, list := c.Kube.CoreV1().ConfigMaps("kube-system"), workload("ConfigMap", "nmi-allowed-identities", nil)
		list.SetNamespace("kube-system")
		list.SetAPIVersion("v1")
		allowed := func() bool { return c.bob.dryRun(newIdentity("shop", "new", managedSpec(third.ClientID, ""))) == nil }
		require.NoError(t, c.admin.patch(list, `{"data":{"shop":"`+third.ClientID+`"}}`))
		require.Eventually(t, allowed, patience, 20*time.Millisecond, "a changed list counts at once")
		before, err := lists.Get(t.Context(), list.GetName(), metav1.GetOptions{})
		require.NoError(t, err)

		require.NoError(t, lists.Delete(t.Context(), list.GetName(), metav1.DeleteOptions{}))
		require.Eventually(t, func() bool { return !allowed() }, patience, 20*time.Millisecond, "without a list nothing is allowed")
		assert.ErrorContains(t, c.bob.dryRun(newIdentity("shop", "new", managedSpec("", ""))), "'nmi-allowed-identities' denied request: failed to configure binding: no params found")
		before.ResourceVersion = ""
		_, err = lists.Create(t.Context(), before, metav1.CreateOptions{})
		require.NoError(t, err)
		require.Eventually(t, allowed, patience, 20*time.Millisecond)
	})
}

// testMICIsNotHindered: its assignments hold copies of identities, listed or not.
func (c *admissionCluster) testMICIsNotHindered(t *testing.T) {
	const mic = "system:serviceaccount:kube-system:aad-pod-id-mic-service-account"
	c.grant(t, "kube-system", everything, mic)
	u := c.user(t, mic)
	assignment := newCustom("AzureAssignedIdentity", "kube-system", "cart-0-shop-cart", map[string]any{
		"azureIdentityRef": map[string]any{"metadata": map[string]any{"name": "cart", "namespace": "shop"}, "spec": managedSpec(unlisted, "x")},
		"azureBindingRef":  map[string]any{"metadata": map[string]any{"name": "cart", "namespace": "shop"}, "spec": map[string]any{"azureIdentity": "cart"}},
		"pod":              "cart-0", "podNamespace": "shop", "nodename": "node1",
	})
	require.NoError(t, u.create(assignment))
	require.NoError(t, u.patch(assignment, `{"status":{"status":"Assigned"}}`))
	require.NoError(t, u.remove(assignment))
	assert.Empty(t, u.warned())
}

const resourceIDForm = "spec.resourceID must be that of a user-assigned identity"

func (c *admissionCluster) testWarnings(t *testing.T) {
	principal := func(changes map[string]any) map[string]any {
		spec := map[string]any{"type": int64(1), "clientID": shared, "tenantID": "contoso.onmicrosoft.com", "clientPassword": map[string]any{"name": "s"}}
		maps.Copy(spec, changes)
		return spec
	}
	set := func(field string, value any) map[string]any { return map[string]any{"type": int64(0), field: value} }
	for name, tc := range map[string]struct {
		kind string
		spec map[string]any
		want []string // the starts of the warnings
	}{
		"managed identity":                {"AzureIdentity", managedSpec(cart.ClientID, cart.ResourceID), nil},
		"in upper case":                   {"AzureIdentity", managedSpec(strings.ToUpper(cart.ClientID), strings.ToUpper(cart.ResourceID)), nil},
		"no type":                         {"AzureIdentity", map[string]any{"clientID": cart.ClientID}, nil},
		"service principal":               {"AzureIdentity", principal(nil), nil},
		"with a certificate":              {"AzureIdentity", principal(map[string]any{"type": int64(2), "adEndpoint": "https://login.microsoftonline.us"}), nil},
		"no spec":                         {"AzureIdentity", nil, []string{"spec.clientID or spec.resourceID must be set"}},
		"neither ID":                      {"AzureIdentity", managedSpec("", ""), []string{"spec.clientID or spec.resourceID must be set"}},
		"blank resource ID":               {"AzureIdentity", managedSpec("", " "), []string{"white space around the value of spec.resourceID", "spec.clientID or spec.resourceID must be set"}},
		"line break after the client ID":  {"AzureIdentity", managedSpec(cart.ClientID+"\n", ""), []string{"white space around the value of spec.clientID"}},
		"white space around both":         {"AzureIdentity", managedSpec(cart.ClientID+" ", "\t"+cart.ResourceID), []string{"white space around the value of spec.clientID, spec.resourceID"}},
		"white space in a principal":      {"AzureIdentity", principal(map[string]any{"tenantID": " t", "adEndpoint": "https://x ", "clientPassword": map[string]any{"name": "s "}}), []string{"white space around the value of spec.tenantID, spec.adEndpoint, spec.clientPassword.name"}},
		"client ID is a name":             {"AzureIdentity", managedSpec("cart", cart.ResourceID), []string{"spec.clientID must be a GUID"}},
		"client ID in braces":             {"AzureIdentity", managedSpec("{"+cart.ClientID+"}", ""), []string{"spec.clientID must be a GUID"}},
		"client ID without hyphens":       {"AzureIdentity", managedSpec(strings.ReplaceAll(cart.ClientID, "-", ""), ""), []string{"spec.clientID must be a GUID"}},
		"two client IDs":                  {"AzureIdentity", managedSpec(cart.ClientID+"\n"+cart.ClientID, ""), []string{"spec.clientID must be a GUID"}},
		"principal's client ID is a name": {"AzureIdentity", principal(map[string]any{"clientID": "cart"}), []string{"spec.clientID must be a GUID"}},
		"resource ID without a slash":     {"AzureIdentity", managedSpec("", cart.ResourceID[1:]), []string{resourceIDForm}},
		"resource ID of a machine":        {"AzureIdentity", managedSpec("", "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/vm"), []string{resourceIDForm}},
		"resource ID with more":           {"AzureIdentity", managedSpec("", cart.ResourceID+"/x"), []string{resourceIDForm}},
		"resource ID with dot segments":   {"AzureIdentity", managedSpec("", strings.Replace(cart.ResourceID, "/g/", "/../", 1)), []string{resourceIDForm}},
		"resource ID ends with a period":  {"AzureIdentity", managedSpec("", cart.ResourceID+"."), []string{resourceIDForm}},
		"resource ID encoded":             {"AzureIdentity", managedSpec("", strings.Replace(cart.ResourceID, "cart", "%63art", 1)), []string{resourceIDForm}},
		"resource ID without a group":     {"AzureIdentity", managedSpec("", strings.Replace(cart.ResourceID, "/g/", "//", 1)), []string{resourceIDForm}},
		"unknown type":                    {"AzureIdentity", map[string]any{"type": int64(3), "clientID": shared, "tenantID": "t", "clientPassword": map[string]any{"name": "s"}}, []string{"spec.type must be 0"}},
		"empty principal": {"AzureIdentity", map[string]any{"type": int64(2)}, []string{
			"spec.clientID must be set for a service principal", "spec.tenantID must be set", "spec.clientPassword.name must be set",
		}},
		"principal with blanks": {"AzureIdentity", principal(map[string]any{"tenantID": " ", "clientPassword": map[string]any{"name": " "}}), []string{
			"white space around the value of spec.tenantID, spec.clientPassword.name", "spec.tenantID must be set", "spec.clientPassword.name must be set",
		}},
		"binding":                   {"AzureIdentityBinding", map[string]any{"azureIdentity": "cart", "selector": "Cart_1.x"}, nil},
		"binding without selector":  {"AzureIdentityBinding", map[string]any{"azureIdentity": "cart"}, []string{"spec.selector is empty, which matches no pod"}},
		"binding with no label":     {"AzureIdentityBinding", map[string]any{"azureIdentity": "cart", "selector": "cart "}, []string{"spec.selector must be a value that the pods' label"}},
		"binding without identity":  {"AzureIdentityBinding", map[string]any{"azureIdentity": "", "selector": "cart"}, []string{"spec.azureIdentity must be the name"}},
		"binding, padded identity":  {"AzureIdentityBinding", map[string]any{"azureIdentity": "cart\n", "selector": "cart"}, []string{"spec.azureIdentity must be the name"}},
		"exception":                 {"AzurePodIdentityException", map[string]any{"podLabels": map[string]any{"a": ""}}, nil},
		"exception without labels":  {"AzurePodIdentityException", map[string]any{"podLabels": map[string]any{}}, []string{"spec.podLabels is empty, which excepts no pod"}},
		"exception without a spec":  {"AzurePodIdentityException", nil, []string{"spec.podLabels is empty, which excepts no pod"}},
		"AzureIdentity, other case": {"AzureIdentity", set("clientid", cart.ClientID), []string{"spec.clientID or spec.resourceID must be set"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.warns(t, newCustom(tc.kind, "bank", "warned", tc.spec), tc.want)
		})
	}
}

// warns checks the starts of the warnings that alice gets for an object.
func (c *admissionCluster) warns(t *testing.T, object *unstructured.Unstructured, want []string) {
	t.Helper()
	c.alice.warned()
	// The allow-list would refuse most of them.
	if err := c.alice.dryRun(object); err != nil {
		require.ErrorContains(t, err, "nmi-allowed-identities")
	}
	var got []string
	for _, warning := range c.alice.warned() {
		_, text, ok := strings.Cut(warning, "': ")
		if ok && strings.HasPrefix(warning, "Validation failed for ValidatingAdmissionPolicy 'nmi-"+strings.ToLower(object.GetKind())+"-values'") {
			got = append(got, text)
		}
	}
	require.Len(t, got, len(want), "%q", got)
	for i, text := range want {
		assert.True(t, strings.HasPrefix(got[i], text), "%q, want %q", got[i], text)
	}
}

func (c *admissionCluster) testStoredInvalidObjects(t *testing.T) {
	for _, kind := range []string{"AzureIdentity", "AzureIdentityBinding", "AzurePodIdentityException"} {
		object := newCustom(kind, "shop", "old-invalid", nil)
		if kind == "AzurePodIdentityException" {
			object.SetName("old-empty")
		}
		c.bob.warned()
		require.NoError(t, c.bob.patch(object, `{"metadata":{"annotations":{"aadpodidentity.k8s.io/Behavior":"namespaced"}}}`))
		assert.Empty(t, c.bob.warned(), "an update of something else")
		require.NoError(t, c.bob.remove(object))
	}
}
