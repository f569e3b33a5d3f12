//go:build cluster

package e2e

import (
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// Identities that no node has: Entra gives their tokens to the service accounts that they trust.
var (
	annotatedID = identity("annotated", 3)
	boundID     = identity("bound", 4)
)

func TestFederation(t *testing.T) {
	s := begin(t, "With no identity on the node, pods get those of their annotated service account and of a federated AzureIdentity, and IMDS is never asked for a token.", theIMDS)
	s.serviceAccount("annotated", map[string]string{podresolver.ClientIDAnnotation: annotatedID.ClientID})
	s.serviceAccount("bound", nil)
	s.trust(map[string]string{"annotated": annotatedID.ClientID, "bound": boundID.ClientID})
	entra, err := world.imds.Entra(t.Context())
	require.NoError(t, err)
	s.trustAuthority(entra,
		"federation.serviceAccounts=true", "federation.rights=namespaces", "federation.namespaces={"+s.namespace+"}",
		"federation.tenantID="+principal.Tenants[0], "federation.authority="+entra.Authority,
	)
	s.bind("bound", boundID)
	s.kubectl("--namespace="+s.namespace, "annotate", "azureidentity", "bound", "aadpodidentity.k8s.io/Federated=true")

	token := func(id imdstest.Identity) request { return request{tokenPath(principalResource), 200, id.ClientID} }
	refused := func(query ...string) request { return request{tokenPath(principalResource, query...), 400, ""} }
	as := func(account string) func(*corev1.PodSpec) {
		return func(spec *corev1.PodSpec) { spec.ServiceAccountName = account }
	}
	// The second comes from memory. As an SDK does, in case the service account's event is late.
	twice := func(id imdstest.Identity, others ...request) []asker {
		return []asker{{requests: append([]request{token(id), token(id)}, others...), retry: true}}
	}
	s.start(
		pod{name: "annotated", spec: as("annotated"), askers: twice(annotatedID, refused("client_id="+boundID.ClientID))},
		pod{name: "bound", binding: "bound", spec: as("bound"), askers: twice(boundID, refused("client_id="+annotatedID.ClientID))},
		pod{name: "neither", askers: []asker{asks(refused(), refused("client_id="+annotatedID.ClientID))}},
		// Entra trusts another service account of this namespace: the binding alone gives nothing.
		pod{name: "untrusted", binding: "bound", spec: as("annotated"), askers: []asker{asks(refused("client_id=" + boundID.ClientID))}},
	)
	s.finish()

	counts := s.imds()
	assert.Empty(t, counts.Tokens, "IMDS has no part in it")
	for _, call := range counts.Calls {
		assert.NotContains(t, call.Target, "/oauth2/token")
	}
	entra, err = world.imds.Entra(t.Context())
	require.NoError(t, err)
	assert.Equal(t, 2, entra.Tokens, "one for each service account")
	s.note("tokens from Entra: %d, requests for tokens to IMDS: 0", entra.Tokens)
}

func (s *scenario) serviceAccount(name string, annotations map[string]string) {
	s.t.Helper()
	_, err := world.kube.CoreV1().ServiceAccounts(s.namespace).Create(s.t.Context(),
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
}

// trust has the fakes know one identity for each of these service accounts, and IMDS none, until the
// end of the scenario.
func (s *scenario) trust(clientIDs map[string]string) {
	s.t.Helper()
	issuer, key := s.issuer()
	cfg := control.Config{Entra: entratest.Config{Resources: []string{principalResource}, Issuers: map[string]*rsa.PublicKey{issuer: key}}}
	for account, clientID := range clientIDs {
		cfg.Entra.Principals = append(cfg.Entra.Principals, entratest.Principal{
			ClientID: clientID, Tenants: principal.Tenants,
			Federated: []entratest.FederatedCredential{{Issuer: issuer, Subject: entratest.Subject(s.namespace, account), Audience: "api://AzureADTokenExchange"}},
		})
	}
	s.t.Cleanup(func() { assert.NoError(s.t, world.configureIMDS(context.Background())) })
	require.NoError(s.t, world.imds.Configure(s.t.Context(), cfg))
}

// issuer returns what Entra reads of a cluster: its issuer's URL and the key of its tokens (OpenID
// Connect Discovery 1.0, section 4; RFC 7517).
func (s *scenario) issuer() (url string, key *rsa.PublicKey) {
	s.t.Helper()
	var configuration struct {
		Issuer string `json:"issuer"`
	}
	var set struct {
		Keys []struct {
			Type     string `json:"kty"`
			Modulus  string `json:"n"`
			Exponent string `json:"e"`
		} `json:"keys"`
	}
	require.NoError(s.t, json.Unmarshal([]byte(s.kubectl("get", "--raw", "/.well-known/openid-configuration")), &configuration))
	require.NoError(s.t, json.Unmarshal([]byte(s.kubectl("get", "--raw", "/openid/v1/jwks")), &set))
	require.Len(s.t, set.Keys, 1)
	require.Equal(s.t, "RSA", set.Keys[0].Type, "Entra accepts RS256 alone")
	number := func(text string) *big.Int {
		bytes, err := base64.RawURLEncoding.DecodeString(text)
		require.NoError(s.t, err)
		return new(big.Int).SetBytes(bytes)
	}
	return configuration.Issuer, &rsa.PublicKey{N: number(set.Keys[0].Modulus), E: int(number(set.Keys[0].Exponent).Int64())}
}
