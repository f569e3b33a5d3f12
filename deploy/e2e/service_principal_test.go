//go:build e2e

package e2e

import (
	"context"
	"crypto/rsa"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/entratest"
)

// servicePrincipal is an application, and a pod that is bound to it.
type servicePrincipal struct {
	*scenario
	*pod
	entra     *entratest.Server
	authority string
	asked     int
}

const (
	principalID     = "5e271c00-0000-4000-8000-000000000001"
	principalTenant = "7e9a9700-0000-4000-8000-000000000001"
	firstSecret     = "f1rst~secret.of-the-principal"
	secondSecret    = "s3cond~secret.of-the-principal"
)

// entra starts a stand-in for Entra on the node's loopback. Programs that are
// started from here on trust it.
func (s *scenario) entra(resources int) (*entratest.Server, string) {
	s.t.Helper()
	key, err := world.IssuerKey()
	require.NoError(s.t, err)
	cfg := entratest.Config{
		Principals: []entratest.Principal{
			{ClientID: principalID, Tenants: []string{principalTenant}, Secret: firstSecret},
			{ClientID: federatedID, Tenants: []string{principalTenant}, Federated: []entratest.FederatedCredential{{Issuer: testbed.Issuer, Subject: entratest.Subject("shop", "unrequested"), Audience: tokenAudience}}},
		},
		Issuers: map[string]*rsa.PublicKey{testbed.Issuer: key},
	}
	for i := range resources {
		cfg.Resources = append(cfg.Resources, resource(i))
	}
	entra := entratest.NewServer(cfg)
	srv := entra.Start()
	s.t.Cleanup(srv.Close)
	authority := filepath.Join(s.t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	require.NoError(s.t, os.WriteFile(authority, block, 0o600))
	s.t.Setenv("SSL_CERT_FILE", authority)
	return entra, srv.URL
}

func resource(i int) string { return fmt.Sprintf("https://resource-%d.example", i) }

// comesTo asks for one resource after the other, since what was refused may be
// remembered, until an answer is as wanted.
func (p *servicePrincipal) comesTo(what string, as func(answer) bool) answer {
	p.scenario.t.Helper()
	var got answer
	require.Eventually(p.scenario.t, func() bool {
		p.asked++
		got = p.asks(resource(p.asked))
		return as(got)
	}, patience, 50*time.Millisecond, "%s, and not %+v", what, &got)
	return got
}

func isToken(a answer) bool { return a.status == http.StatusOK && a.subject == principalID }

// writeSecret makes or changes a secret of namespace shop until the test ends.
func (s *scenario) writeSecret(name, value string) {
	s.t.Helper()
	secrets := world.Kube.CoreV1().Secrets("shop")
	_ = secrets.Delete(s.t.Context(), name, metav1.DeleteOptions{}) // there may be none
	_, err := secrets.Create(s.t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"clientsecret": value}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = secrets.Delete(context.Background(), name, metav1.DeleteOptions{}) })
}

// allow applies deploy/service-principals to namespace shop until the test ends.
func (s *scenario) allow(secret string) {
	s.t.Helper()
	objects, err := testbed.ReadManifests(os.DirFS("../../deploy/service-principals"), "rbac.yaml")
	require.NoError(s.t, err)
	for _, object := range objects {
		object.SetNamespace("shop")
		if object.GetKind() != "Role" {
			continue
		}
		rules, _, err := unstructured.NestedSlice(object.Object, "rules")
		require.NoError(s.t, err)
		require.Len(s.t, rules, 1)
		rules[0].(map[string]any)["resourceNames"] = []any{secret}
		require.NoError(s.t, unstructured.SetNestedSlice(object.Object, rules, "rules"))
	}
	require.NoError(s.t, testbed.Apply(s.t.Context(), world.Custom, objects))
	s.t.Cleanup(func() {
		const name = "nmi-service-principals"
		rbac := world.Kube.RbacV1()
		assert.NoError(s.t, rbac.RoleBindings("shop").Delete(context.Background(), name, metav1.DeleteOptions{}))
		assert.NoError(s.t, rbac.Roles("shop").Delete(context.Background(), name, metav1.DeleteOptions{}))
	})
}

func (s *scenario) principalIdentity(name, authority string, secret map[string]any) {
	s.t.Helper()
	s.put("AzureIdentity", "shop", name, map[string]any{"spec": map[string]any{
		"type": int64(1), "clientID": principalID, "tenantID": principalTenant, "adEndpoint": authority, "clientPassword": secret,
	}})
	s.binding("shop", name, name, name)
}

func TestAServicePrincipalsSecret(t *testing.T) {
	s := begin(t)
	p := &servicePrincipal{scenario: s, pod: s.pod("principal-0", "10.244.0.49", testbed.Ptp, "principal")}
	p.entra, p.authority = s.entra(1000)
	s.principalIdentity("principal", p.authority, map[string]any{"name": "credentials"})
	s.writeSecret("another", firstSecret)
	a := s.agent("--entra-authority="+p.authority, "--v=10")

	refused := func(a answer) bool {
		return a.status == http.StatusBadRequest && strings.Contains(a.body, `"invalid_client"`)
	}
	got := p.comesTo("refused without the role", refused)
	assert.NotContains(t, got.body, "credentials")
	s.says(a, "secret shop/credentials: it cannot be read: the agent's service account may not get it; apply deploy/service-principals/rbac.yaml to namespace shop")

	s.allow("credentials")
	p.comesTo("refused without the secret", func(answer) bool { return strings.Contains(a.Log(), "there is no such secret") })
	assert.Empty(t, p.entra.Calls(), "nothing to ask with")

	s.writeSecret("credentials", firstSecret)
	p.comesTo("a token", isToken)
	inMemory := resource(p.asked)

	// Entra no longer takes the old secret. A token that is in memory is still good.
	p.entra.SetSecret(principalID, secondSecret)
	got = p.comesTo("refused with the old secret", refused)
	assert.Contains(t, got.body, "AADSTS7000215")
	s.writeSecret("credentials", secondSecret)
	p.comesTo("a token by the new secret", isToken)
	tokens := p.entra.Tokens()
	assert.True(t, isToken(p.asks(inMemory)))
	assert.Equal(t, tokens, p.entra.Tokens())

	// The role is for one secret, and that is all.
	config, err := clientcmd.BuildConfigFromFlags("", world.Kubeconfig)
	require.NoError(t, err)
	agents, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	_, err = agents.CoreV1().Secrets("shop").Get(t.Context(), "another", metav1.GetOptions{})
	assert.True(t, apierrors.IsForbidden(err), err)
	_, err = agents.CoreV1().Secrets("shop").List(t.Context(), metav1.ListOptions{})
	assert.True(t, apierrors.IsForbidden(err), err)

	for _, secret := range []string{firstSecret, secondSecret, "eyJzdWIi"} {
		assert.NotContains(t, a.Log(), secret)
	}
	assert.Zero(t, world.IMDS.Tokens(), "IMDS has no part in it")
}

func TestASecretIsNotBorrowedOrSentAway(t *testing.T) {
	s := begin(t)
	_, authority := s.entra(1000)
	p := &servicePrincipal{scenario: s, pod: s.pod("borrower-0", "10.244.0.50", testbed.Ptp, "borrower")}
	away := &servicePrincipal{scenario: s, pod: s.pod("away-0", "10.244.0.51", testbed.Ptp, "away")}
	s.principalIdentity("borrower", authority, map[string]any{"name": "credentials", "namespace": "kube-system"})
	s.principalIdentity("away", "https://127.0.0.1:1", map[string]any{"name": "credentials"})
	s.writeSecret("credentials", firstSecret)
	s.allow("credentials")
	a := s.agent("--entra-authority=" + authority)

	p.comesTo("no identity", func(a answer) bool { return a.status == 400 && strings.Contains(a.body, "Identity not found") })
	s.says(a, `names a secret in namespace \"kube-system\"`)
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig}, "explain", "--operation-mode=managed", "shop/borrower-0")
	require.NoError(t, err)
	assert.Zero(t, code)
	assert.Contains(t, output, `AzureIdentity "borrower", which names a secret in namespace "kube-system"`)

	away.comesTo("refused", func(a answer) bool { return a.status == 400 && strings.Contains(a.body, "invalid_client") })
	s.says(a, "is neither one of Microsoft's nor named by --entra-authority")
}
