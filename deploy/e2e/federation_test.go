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
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/entratest"
)

const (
	federatedID    = "fed00000-0000-4000-8000-000000000001"
	tokenAudience  = "api://AzureADTokenExchange"
	federationFlag = "--federation=annotated"
	secondNode     = "node2"
)

// federation is a cluster whose pods get tokens by federation. Service account shop/cart is annotated,
// and has a pod on this node and one on another; shop/batch has the federated AzureIdentity batch.
type federation struct {
	*scenario
	entra      *entratest.Server
	authority  string
	kubeconfig string // of the agent's pod on this node
	cart       *pod
	namespace  string // of the pods
}

func (s *scenario) federation() *federation {
	s.t.Helper()
	f := &federation{scenario: s, namespace: "shop"}
	key, err := world.IssuerKey()
	require.NoError(s.t, err)
	trusted := func(account string) entratest.FederatedCredential {
		return entratest.FederatedCredential{Issuer: testbed.Issuer, Subject: entratest.Subject("shop", account), Audience: tokenAudience}
	}
	f.entra = entratest.NewServer(entratest.Config{
		Principals: []entratest.Principal{{ClientID: federatedID, Tenants: []string{principalTenant}, Federated: []entratest.FederatedCredential{trusted("cart"), trusted("batch")}}},
		Resources:  []string{vault, resource(1), resource(2), resource(3)},
		Issuers:    map[string]*rsa.PublicKey{testbed.Issuer: key},
	})
	srv := f.entra.Start()
	s.t.Cleanup(srv.Close)
	f.authority = srv.URL
	ca := filepath.Join(s.t.TempDir(), "ca.pem")
	require.NoError(s.t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600))
	s.t.Setenv("SSL_CERT_FILE", ca)

	for _, node := range []string{testbed.NodeName, secondNode} {
		s.createNode(node)
	}
	f.serviceAccount("cart", map[string]string{"azure.workload.identity/client-id": federatedID})
	f.serviceAccount("batch", nil)
	f.cart = s.network("10.244.0.101", testbed.Ptp)
	f.podOf("shop", "cart", "cart-0", testbed.NodeName, "10.244.0.101", "")
	f.podOf("shop", "cart", "cart-1", secondNode, "", "")
	f.podOf("kube-system", "nmi", "nmi-f2f4z", testbed.NodeName, "", "")
	f.kubeconfig, err = world.PodKubeconfig(s.t.Context(), "kube-system", "nmi", "nmi-f2f4z")
	require.NoError(s.t, err)
	return f
}

func (f *federation) serviceAccount(name string, annotations map[string]string) {
	f.t.Helper()
	accounts := world.Kube.CoreV1().ServiceAccounts("shop")
	_, err := accounts.Create(f.t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}, metav1.CreateOptions{})
	require.NoError(f.t, err)
	f.t.Cleanup(func() { _ = accounts.Delete(context.Background(), name, metav1.DeleteOptions{}) })
}

// podOf makes the object of a pod with a service account until the test ends.
func (f *federation) podOf(namespace, account, name, node, addr, label string) {
	f.t.Helper()
	f.podWithTokens(namespace, account, name, node, label, "")
	if addr != "" {
		require.NoError(f.t, world.SetPodAddress(f.t.Context(), namespace, name, addr))
	}
}

// grant applies files of deploy/federation until the test ends; what belongs to a namespace, to shop.
func (f *federation) grant(files ...string) {
	f.t.Helper()
	objects, err := testbed.ReadManifests(os.DirFS("../federation"), files...)
	require.NoError(f.t, err)
	for _, object := range objects {
		if kind := object.GetKind(); kind == "Role" || kind == "RoleBinding" {
			object.SetNamespace("shop")
		}
	}
	require.NoError(f.t, testbed.Apply(f.t.Context(), world.Custom, objects))
	f.t.Cleanup(func() { f.revoke(objects) })
}

func (f *federation) revoke(objects []*unstructured.Unstructured) {
	for _, object := range objects {
		resource, _ := meta.UnsafeGuessKindToResource(object.GroupVersionKind())
		_ = world.Custom.Resource(resource).Namespace(object.GetNamespace()).Delete(context.Background(), object.GetName(), metav1.DeleteOptions{})
	}
}

func (f *federation) starts(flags ...string) *testbed.Agent {
	f.t.Helper()
	return f.agentOf(f.kubeconfig, append([]string{
		"--operation-mode=managed", "--entra-authority=" + f.authority, "--federation-authority=" + f.authority, "--federation-tenant-id=" + principalTenant, "--pod-wait=1s",
	}, flags...)...)
}

// agentIn is the agent's client, perhaps in a node's name.
func (f *federation) agentIn(node string) kubernetes.Interface {
	f.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", f.kubeconfig)
	require.NoError(f.t, err)
	if node != "" {
		config.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + node}
	}
	client, err := kubernetes.NewForConfig(config)
	require.NoError(f.t, err)
	return client
}

// requests requests a token as a stolen token of the agent could; without an audience it is the API server's.
func (f *federation) requests(as kubernetes.Interface, namespace, account, pod, audience string) error {
	f.t.Helper()
	ctx, cancel := requestContext()
	defer cancel()
	var bound *authenticationv1.BoundObjectReference
	if pod != "" {
		object, err := world.Kube.CoreV1().Pods(namespace).Get(ctx, pod, metav1.GetOptions{})
		require.NoError(f.t, err)
		bound = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod, UID: object.UID}
	}
	life := int64(600)
	var audiences []string
	if audience != "" {
		audiences = []string{audience}
	}
	_, err := as.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, ExpirationSeconds: &life, BoundObjectRef: bound},
	}, metav1.CreateOptions{})
	return err
}

// comesToToken waits until the pod gets a token: the API server reads roles by watches of its own, and
// refusals are remembered.
func (f *federation) comesToToken(p *pod, resource string) {
	f.t.Helper()
	var got answer
	require.Eventually(f.t, func() bool {
		got = p.asks(resource)
		return got.status == http.StatusOK && got.subject == federatedID
	}, patience, 200*time.Millisecond, "%+v", &got)
}

// awaitRight waits until a right that was given just now counts.
func (f *federation) awaitRight(request func() error) {
	f.t.Helper()
	var err error
	require.Eventually(f.t, func() bool { err = request(); return err == nil }, patience, 100*time.Millisecond, "%v", &err)
}

func assertForbidden(t *testing.T, err error, what string) {
	t.Helper()
	assert.True(t, apierrors.IsForbidden(err), "%s: %v", what, err)
}

// TestFederationOnOwnNode: the agent's token is worth the pods of its own node and nothing else.
func TestFederationOnOwnNode(t *testing.T) {
	s := begin(t)
	f := s.federation()
	own, plain := f.agentIn(testbed.NodeName), f.agentIn("")
	assertForbidden(t, f.requests(own, "shop", "cart", "cart-0", tokenAudience), "without any right")
	f.grant("own-node.yaml", "service-accounts.yaml")
	f.awaitRight(func() error { return f.requests(own, "shop", "cart", "cart-0", tokenAudience) })
	f.podWithTokens("shop", "cart", "cart-3", testbed.NodeName, "", "https://vault")
	require.Eventually(t, func() bool { return f.requests(own, "shop", "cart", "cart-0", "") != nil }, patience, 100*time.Millisecond, "the policy is not in force")

	for what, err := range map[string]error{
		"a pod of another node":        f.requests(own, "shop", "cart", "cart-1", tokenAudience),
		"another node's name":          f.requests(f.agentIn(secondNode), "shop", "cart", "cart-1", tokenAudience),
		"a token bound to no pod":      f.requests(own, "shop", "cart", "", tokenAudience),
		"another audience":             f.requests(own, "shop", "cart", "cart-0", "https://another"),
		"the API server's audience":    f.requests(own, "shop", "cart", "cart-0", testbed.Issuer),
		"the same, as kubelets ask":    f.requests(own, "shop", "cart", "cart-0", ""),
		"what a pod's volume names":    f.requests(own, "shop", "cart", "cart-3", "https://vault"),
		"in its own name":              f.requests(plain, "shop", "cart", "cart-0", tokenAudience),
		"an account without a pod":     f.requests(own, "shop", "batch", "", tokenAudience),
		"another pod's account":        f.requests(own, "shop", "batch", "cart-0", tokenAudience),
		"its own account in that name": f.requests(own, "kube-system", "nmi", "nmi-f2f4z", "https://another"),
	} {
		assert.Error(t, err, what)
		if what != "another pod's account" {
			assertForbidden(t, err, what)
		}
	}
	ctx := t.Context()
	certified, err := world.Kubelet(testbed.NodeName)
	require.NoError(t, err)
	kubelet, err := kubernetes.NewForConfig(certified)
	require.NoError(t, err)
	require.NoError(t, f.requests(kubelet, "shop", "cart", "cart-0", ""), "the kubelet's own right")
	require.NoError(t, f.requests(kubelet, "shop", "cart", "cart-3", "https://vault"))
	_, err = own.CoreV1().Secrets("shop").List(ctx, metav1.ListOptions{})
	assertForbidden(t, err, "what a node may do otherwise")
	_, err = own.CoreV1().Nodes().Patch(ctx, testbed.NodeName, types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{})
	assertForbidden(t, err, "its node")

	a := f.starts(federationFlag, "--federation-as-node")
	require.NoError(t, a.AwaitReady(ctx))
	f.comesToToken(f.cart, vault)
	exchanged := f.entra.Tokens()
	assert.Equal(t, federatedID, f.cart.asks(vault).subject)
	assert.Equal(t, exchanged, f.entra.Tokens(), "from memory")
	assert.Empty(t, world.IMDS.Calls(), "the node has no part in it")
	assert.NotContains(t, a.Log(), "eyJ")

	d := s.diagnose(f.kubeconfig, asAgent, "--probe-socket="+a.ProbeSocket)
	assert.Contains(t, d.about("federation")[0].Description, "those of its own node's pods", "%+v", d.about("federation"))
	assert.Len(t, d.about("rights"), 12)

	// Nodes may have tokens for the audiences that a pod's volumes name. For others the manifest gives
	// them the right.
	require.NoError(t, world.Kube.RbacV1().ClusterRoleBindings().Delete(ctx, "nmi-federation-audience", metav1.DeleteOptions{}))
	require.Eventually(t, func() bool {
		return apierrors.IsForbidden(f.requests(own, "shop", "cart", "cart-0", tokenAudience))
	}, patience, 100*time.Millisecond, "without the audience")
	f.podWithTokens("shop", "cart", "cart-2", testbed.NodeName, "", tokenAudience)
	f.awaitRight(func() error { return f.requests(own, "shop", "cart", "cart-2", tokenAudience) })
}

// podWithTokens makes the object of a pod with volumes of tokens for audiences until the test ends. ""
// is the API server's, for which the admission plugin ServiceAccount, which is off here, gives a volume
// to nearly all pods.
func (f *federation) podWithTokens(namespace, account, name, node, label string, audiences ...string) {
	f.t.Helper()
	life := int64(3600)
	var sources []corev1.VolumeProjection
	for i, audience := range audiences {
		sources = append(sources, corev1.VolumeProjection{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: audience, ExpirationSeconds: &life, Path: fmt.Sprint("token", i)}})
	}
	_, err := world.Kube.CoreV1().Pods(namespace).Create(f.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"aadpodidbinding": label}},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{{Name: "app", Image: "example/app"}},
			Volumes: []corev1.Volume{{Name: "tokens", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: sources}}}},
		},
	}, metav1.CreateOptions{})
	require.NoError(f.t, err)
	f.t.Cleanup(func() { _ = world.DeletePod(context.Background(), namespace, name) })
}

// TestFederationInNamespaces: Roles, and a federated AzureIdentity without --federation=annotated.
func TestFederationInNamespaces(t *testing.T) {
	s := begin(t)
	f := s.federation()
	s.put("AzureIdentity", "shop", "batch", map[string]any{
		"annotations": map[string]any{"aadpodidentity.k8s.io/Federated": "true"},
		"spec":        map[string]any{"type": int64(0), "clientID": federatedID, "tenantID": principalTenant, "adEndpoint": f.authority},
	})
	s.binding("shop", "batch", "batch", "batch")
	batch := s.network("10.244.0.102", testbed.Ptp)
	f.podOf("shop", "batch", "batch-0", testbed.NodeName, "10.244.0.102", "batch")
	a := f.starts()
	require.NoError(t, a.AwaitReady(t.Context()))
	got := batch.asks(vault)
	assert.Equal(t, http.StatusBadRequest, got.status, got.body)
	assert.Contains(t, got.body, "see the log of the node's agent")
	s.says(a, "apply deploy/federation/namespace.yaml to namespace shop")
	s.awaitEvent("batch-0", "CredentialUnusable", "service account shop/batch", 1)
	assert.Equal(t, http.StatusBadRequest, f.cart.asks(vault).status, "annotations do not count")

	f.grant("namespace.yaml")
	f.comesToToken(batch, resource(1))
	assertForbidden(t, f.requests(f.agentIn(""), "kube-system", "nmi", "nmi-f2f4z", tokenAudience), "another namespace")
	d := s.diagnose(f.kubeconfig, asAgent, "--probe-socket="+a.ProbeSocket)
	assert.Contains(t, d.about("federation")[0].Description, "those of namespaces with pods on this node: shop", "%+v", d.about("federation"))

	code, plan, err := testbed.RunAgent([]string{"KUBECONFIG=" + f.kubeconfig}, "migrate", "--operation-mode=managed")
	require.NoError(t, err)
	assert.Zero(t, code, plan)
	assert.Contains(t, plan, "AzureIdentity shop/batch: moved\n  service accounts: shop/batch (pods: 1)\n")
	assert.Contains(t, plan, "Entra cannot reach the cluster's issuer \"https://testbed\"")

	f.entra.SetFederated(federatedID)
	got = batch.asks(resource(2))
	assert.Equal(t, http.StatusBadRequest, got.status)
	assert.Contains(t, got.body, "AADSTS70021")
	s.awaitEvent("batch-0", "FederationUnknown", `subject "system:serviceaccount:shop:batch", issuer "https://testbed"`, 1)
	for _, call := range world.IMDS.Calls() { // the doctor's is among them
		assert.NotContains(t, call.Target, "oauth2/token", "not even when it fails")
	}
	assert.NotContains(t, a.Log(), "eyJ")

	// The API server is away: what is in memory is served.
	require.NoError(t, world.StopAPIServer())
	served := batch.asks(resource(1))
	missing := batch.asks(resource(3))
	require.NoError(t, world.StartAPIServer(t.Context()))
	assert.Equal(t, http.StatusOK, served.status, served.body)
	assert.Equal(t, http.StatusServiceUnavailable, missing.status, missing.body)
}

// TestFederationInTheCluster: the wide right, and changes of service accounts.
func TestFederationInTheCluster(t *testing.T) {
	s := begin(t)
	f := s.federation()
	f.grant("cluster.yaml", "service-accounts.yaml")
	a := f.starts(federationFlag)
	require.NoError(t, a.AwaitReady(t.Context()))
	f.comesToToken(f.cart, vault)
	code, output := s.explains(f.kubeconfig, "--operation-mode=managed", federationFlag, "--federation-tenant-id="+principalTenant, "shop/cart-0")
	assert.Zero(t, code, output)
	assert.Contains(t, output, "gets by default ServiceAccount shop/cart (federated, client ID "+federatedID+", tenant "+principalTenant+")")
	require.NoError(t, f.requests(f.agentIn(""), "kube-system", "nmi", "nmi-f2f4z", testbed.Issuer), "why it is only for who asks for it")

	s.finds(s.diagnose(f.kubeconfig, asAgent, "--probe-socket="+a.ProbeSocket), "federation", "warning", "every service account of the cluster")

	accounts := world.Kube.CoreV1().ServiceAccounts("shop")
	_, err := accounts.Patch(t.Context(), "cart", types.MergePatchType, []byte(`{"metadata":{"annotations":{"azure.workload.identity/client-id":null}}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return f.cart.asks(vault).status == http.StatusBadRequest }, patience, 100*time.Millisecond)
	exchanged := f.entra.Tokens()
	_, err = accounts.Patch(t.Context(), "cart", types.MergePatchType, []byte(`{"metadata":{"annotations":{"azure.workload.identity/client-id":"`+federatedID+`"}}}`), metav1.PatchOptions{})
	require.NoError(t, err)
	f.comesToToken(f.cart, vault)
	assert.Equal(t, exchanged+1, f.entra.Tokens(), "the old token was dropped")
}

// TestFederationInModeNone: Cilium redirects, and what follows is the same.
func TestFederationInModeNone(t *testing.T) {
	s := begin(t)
	f := s.federation()
	f.grant("namespace.yaml", "service-accounts.yaml")
	a := f.starts(federationFlag, "--redirect-mode=none")
	require.NoError(t, a.AwaitReady(t.Context()))
	// As to the pod of a local redirect policy, see deploy/cilium.
	redirected := strings.Replace(tokenURL, testbed.MetadataAddress, testbed.NodeAddress+":2579", 1)
	f.awaitRight(func() error { return f.requests(f.agentIn(""), "shop", "cart", "cart-0", tokenAudience) })
	var got answer
	require.Eventually(t, func() bool { // a refusal is remembered for ten seconds
		got = f.cart.get(redirected+vault, patience)
		return got.status == http.StatusOK
	}, patience, 200*time.Millisecond, "%+v", &got)
	assert.Equal(t, federatedID, got.subject)
	exchanged := f.entra.Tokens()
	assert.Equal(t, federatedID, f.cart.get(redirected+vault, patience).subject)
	assert.Equal(t, exchanged, f.entra.Tokens(), "from memory")

	f.entra.SetFederated(federatedID)
	got = f.cart.get(redirected+resource(1), patience)
	assert.Equal(t, http.StatusBadRequest, got.status)
	assert.Contains(t, got.body, "AADSTS70021")
	outside := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: world.Metadata.DialContext, DisableKeepAlives: true}}
	stranger := ask(t, outside, redirected+vault)
	assert.Equal(t, http.StatusServiceUnavailable, stranger.status, "from the network: no pod of this node")
	assert.Empty(t, stranger.subject)
	for _, call := range world.IMDS.Calls() {
		assert.NotContains(t, call.Target, "oauth2/token")
	}
}
