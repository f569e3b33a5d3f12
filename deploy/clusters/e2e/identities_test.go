//go:build cluster

package e2e

import (
	"context"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/proxy/imdstest"
)

func TestBoundUnboundExcepted(t *testing.T) {
	s := begin(t, "A bound pod gets its identity's token, an unbound one none, an excepted one the node's.", theIMDS)
	s.bind("cart", cart)
	s.except("monitoring", "app", "monitoring")
	s.start(
		pod{name: "bound", binding: "cart", askers: []asker{asks(s.token(cart), s.refused("client_id="+report.ClientID))}},
		pod{name: "unbound", askers: []asker{asks(s.refused(), s.refused("client_id="+cart.ClientID))}},
		pod{name: "excepted", labels: map[string]string{"app": "monitoring"}, askers: []asker{asks(s.nodeToken())}},
	)
	s.finish()
}

func TestSeveralIdentities(t *testing.T) {
	s := begin(t, "A pod with several identities gets the one that it names, and the first of its bindings' if it names none.", theIMDS)
	s.bind("both", cart)
	s.bind("both", report)                                            // of two bindings of the same second the first by name counts: that is cart's, too
	ask := asks(s.token(cart), s.refused("object_id="+cart.ObjectID)) // object IDs are not in an AzureIdentity
	for _, id := range []imdstest.Identity{cart, report} {
		ask.requests = append(ask.requests, s.token(id, "client_id="+id.ClientID), s.token(id, "msi_res_id="+id.ResourceID), s.token(id, "mi_res_id="+id.ResourceID))
	}
	s.start(pod{name: "both", binding: "both", askers: []asker{ask}})
	s.finish()

	s.upgrade("nmi.extraArgs={--strict-identity-selection}")
	s.start(pod{name: "strict", binding: "both", askers: []asker{asks(s.refused(), s.token(report, "client_id="+report.ClientID))}})
	s.finish()
}

func TestServicePrincipal(t *testing.T) {
	s := begin(t, "A service principal's token comes from Entra, with the secret that the agent may read.", theIMDS)
	entra, err := world.imds.Entra(t.Context())
	require.NoError(t, err)
	s.trustAuthority(entra, "rbac.secrets."+s.namespace+"={credentials}")

	_, err = world.kube.CoreV1().Secrets(s.namespace).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "credentials"}, StringData: map[string]string{"clientsecret": principal.Secret},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	s.create("AzureIdentity", "principal", map[string]any{
		"type": int64(1), "clientID": principal.ClientID, "tenantID": principal.Tenants[0], "adEndpoint": entra.Authority,
		"clientPassword": map[string]any{"name": "credentials"},
	})
	s.bindTo("principal", "principal")
	s.start(pod{name: "principal", binding: "principal", askers: []asker{asks(request{tokenPath(principalResource), 200, principal.ClientID})}})
	s.finish()
	assert.Empty(t, s.imds().Tokens, "IMDS has no part in it")
}

// trustAuthority has the agent get tokens from the fake Entra, as from one of a private
// cloud, with further values of the chart.
func (s *scenario) trustAuthority(entra control.Entra, values ...string) {
	s.t.Helper()
	const name, path = "nmi-e2e-authority", "/etc/nmi-e2e"
	maps := world.kube.CoreV1().ConfigMaps(agentNamespace)
	_, err := maps.Create(s.t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"ca.pem": entra.Certificate}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, maps.Delete(context.Background(), name, metav1.DeleteOptions{})) })
	s.upgrade(append(values,
		"nmi.extraArgs={--entra-authority="+entra.Authority+"}",
		"nmi.extraEnv[0].name=SSL_CERT_FILE", "nmi.extraEnv[0].value="+path+"/ca.pem",
		"nmi.extraVolumes[0].name=authority", "nmi.extraVolumes[0].configMap.name="+name,
		"nmi.extraVolumeMounts[0].name=authority", "nmi.extraVolumeMounts[0].mountPath="+path,
	)...)
}
