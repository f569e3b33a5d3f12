//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// newServiceAccount is a service account with annotations as key, value, ….
func newServiceAccount(namespace, name string, annotations ...string) *unstructured.Unstructured {
	object := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{"namespace": namespace, "name": name}}}
	all := make(map[string]string)
	for i := 0; i < len(annotations); i += 2 {
		all[annotations[i]] = annotations[i+1]
	}
	object.SetAnnotations(all)
	return object
}

// testFederationWarnings: of the annotations for federation. The agent refuses the same values, see
// TestFederatedIdentity and TestUnusableAnnotations of podresolver.
func (c *admissionCluster) testFederationWarnings(t *testing.T) {
	const (
		clientID, tenantID, additional = podresolver.ClientIDAnnotation, podresolver.TenantIDAnnotation, podresolver.AdditionalClientIDsAnnotation
		tenant                         = "7e9a9700-0000-4000-8000-000000000001"
	)
	with := func(field string, value any) map[string]any {
		spec := managedSpec(cart.ClientID, "")
		spec[field] = value
		return spec
	}
	federated := func(value string, spec map[string]any) *unstructured.Unstructured {
		object := newIdentity("bank", "warned", spec)
		object.SetAnnotations(map[string]string{aadpodidentity.FederatedAnnotation: value})
		return object
	}
	misspelt := newIdentity("bank", "warned", managedSpec(cart.ClientID, ""))
	misspelt.SetAnnotations(map[string]string{strings.ToLower(aadpodidentity.FederatedAnnotation): "true", "example.com/a": "b"})
	principal := map[string]any{"type": int64(1), "clientID": shared, "tenantID": "t", "clientPassword": map[string]any{"name": "s"}}
	account := func(annotations ...string) *unstructured.Unstructured {
		return newServiceAccount("bank", "warned", annotations...)
	}
	var many []string
	for i := range 21 {
		many = append(many, fmt.Sprintf("11111111-2222-3333-4444-%012d", i))
	}
	for name, tc := range map[string]struct {
		object *unstructured.Unstructured
		want   []string // the starts of the warnings
	}{
		"federated":                      {federated("true", managedSpec(cart.ClientID, "")), nil},
		"with a tenant":                  {federated(" TRUE\n", with("tenantID", "contoso.onmicrosoft.com")), nil},
		"not federated":                  {federated("false", managedSpec("", cart.ResourceID)), nil},
		"no value":                       {federated("", managedSpec("", cart.ResourceID)), nil},
		"odd key":                        {misspelt, []string{"annotations without effect: aadpodidentity.k8s.io/federated; "}},
		"odd value":                      {federated("yes", managedSpec(cart.ClientID, "")), []string{`the annotation aadpodidentity.k8s.io/Federated must be "true" or "false"`}},
		"a service principal":            {federated("true", principal), []string{"the annotation aadpodidentity.k8s.io/Federated is for type 0"}},
		"resource ID alone":              {federated("true", managedSpec("", cart.ResourceID)), []string{"spec.clientID must be set for a federated identity"}},
		"odd tenant":                     {federated("true", with("tenantID", "../common")), []string{"spec.tenantID must be a GUID or a domain"}},
		"odd tenant, not federated":      {federated("false", with("tenantID", "../common")), nil},
		"service account":                {account(), nil},
		"annotated":                      {account(clientID, cart.ClientID, tenantID, tenant, additional, " "+shared+" ,"+strings.ToUpper(report.ClientID)+","), nil},
		"empty annotations":              {account(clientID, "", tenantID, "", additional, ""), nil},
		"odd keys":                       {account("azure.workload.identity/clientid", cart.ClientID), []string{"annotations without effect: azure.workload.identity/clientid; "}},
		"client ID is a name":            {account(clientID, "cart"), []string{"the annotation azure.workload.identity/client-id must be a GUID"}},
		"client ID with white space":     {account(clientID, cart.ClientID+"\n"), []string{"white space around the value of the annotation azure.workload.identity/client-id"}},
		"tenant is a path":               {account(clientID, cart.ClientID, tenantID, "a/b"), []string{"the annotation azure.workload.identity/tenant-id must be a GUID or a domain"}},
		"additional client IDs alone":    {account(additional, shared), []string{"the annotation aadpodidentity.k8s.io/additional-client-ids requires"}},
		"additional client ID malformed": {account(clientID, cart.ClientID, additional, shared+",report"), []string{"the annotation aadpodidentity.k8s.io/additional-client-ids must be GUIDs"}},
		"separated by blanks":            {account(clientID, cart.ClientID, additional, shared+" "+report.ClientID), []string{"the annotation aadpodidentity.k8s.io/additional-client-ids must be GUIDs"}},
		"twenty":                         {account(clientID, cart.ClientID, additional, strings.Join(many[:20], ",")), nil},
		"twenty-one":                     {account(clientID, cart.ClientID, additional, strings.Join(many, ",")), []string{"the annotation aadpodidentity.k8s.io/additional-client-ids has more than 20"}},
	} {
		t.Run(name, func(t *testing.T) { c.warns(t, tc.object, tc.want) })
	}

	t.Run("update", func(t *testing.T) {
		stored := account(clientID, "cart")
		require.NoError(t, c.alice.create(stored))
		require.Len(t, c.alice.warned(), 1, "it is stored all the same")
		require.NoError(t, c.alice.patch(stored, `{"metadata":{"labels":{"a":"b"}}}`))
		assert.Empty(t, c.alice.warned(), "an update of something else")
		require.NoError(t, c.alice.patch(stored, `{"metadata":{"annotations":{"azure.workload.identity/tenant-id":"`+tenant+`"}}}`))
		assert.Len(t, c.alice.warned(), 1)
		require.NoError(t, c.alice.patch(stored, `{"metadata":{"annotations":{"azure.workload.identity/client-id":"`+cart.ClientID+`"}}}`))
		assert.Empty(t, c.alice.warned())
		require.NoError(t, c.alice.remove(stored))

		identity := newIdentity("shop", "annotated-later", managedSpec(shared, ""))
		require.NoError(t, c.alice.create(identity))
		assert.Empty(t, c.alice.warned())
		require.NoError(t, c.alice.patch(identity, `{"metadata":{"annotations":{"aadpodidentity.k8s.io/Federated":"yes"}}}`))
		assert.Len(t, c.alice.warned(), 1)
		require.NoError(t, c.alice.remove(identity))
	})
}
