//go:build e2e

package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// helm is Helm as the administrator of a cluster.
type helm struct{ path, kubeconfig, namespace string }

func newHelm(t *testing.T, c *testbed.World) helm {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "tool", "-modfile=../../.ci/helm/go.mod", "-n", "helm").Output()
	require.NoError(t, err)
	h := helm{strings.TrimSpace(string(out)), filepath.Join(t.TempDir(), "kubeconfig"), "kube-system"}
	writeAdminKubeconfig(t, c, h.kubeconfig)
	return h
}

func writeAdminKubeconfig(t *testing.T, c *testbed.World, path string) {
	t.Helper()
	config, admin := clientcmdapi.NewConfig(), c.Admin()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: admin.Host, InsecureSkipTLSVerify: true}
	config.AuthInfos["admin"] = &clientcmdapi.AuthInfo{Token: admin.BearerToken}
	config.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "admin"}
	config.CurrentContext = "c"
	require.NoError(t, clientcmd.WriteToFile(*config, path))
}

func (h helm) run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), h.path, append(args, "--namespace="+h.namespace)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+h.kubeconfig)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h helm) succeeds(t *testing.T, args ...string) string {
	t.Helper()
	out, err := h.run(t, args...)
	require.NoError(t, err, out)
	return out
}

// chartForTestbed is a copy of the chart that takes the testbed's API server, which does not know
// its own version.
func chartForTestbed(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "nmi")
	out, err := exec.CommandContext(t.Context(), "cp", "-rL", "../chart", dir).CombinedOutput()
	require.NoError(t, err, string(out))
	path := filepath.Join(dir, "Chart.yaml")
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	before, after, found := strings.Cut(string(text), "kubeVersion:")
	require.True(t, found)
	_, after, _ = strings.Cut(after, "\n")
	require.NoError(t, os.WriteFile(path, []byte(before+after), 0o600))
	return dir
}

// TestHelm takes over, in a cluster of its own, what the manifests made; upgrades, cleans up and
// uninstalls.
func TestHelm(t *testing.T) {
	c, err := world.AddCluster(t.Context()) // the manifests are applied to it
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	require.NoError(t, c.CreateNamespace(t.Context(), "shop"))
	require.NoError(t, c.Bind(t.Context(), "shop", "cart", cart))
	h := newHelm(t, c)
	generation := func() int64 {
		t.Helper()
		ds, err := c.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
		require.NoError(t, err)
		return ds.Generation
	}
	before := generation()

	chart := chartForTestbed(t)
	out, err := h.run(t, "install", "nmi", chart)
	require.Error(t, err)
	assert.Contains(t, out, "invalid ownership metadata")
	out = h.succeeds(t, "install", "nmi", chart, "--take-ownership", "--force-conflicts")
	assert.Contains(t, out, "nmi runs in managed mode")
	assert.Equal(t, before, generation(), "the same DaemonSet: its pods are not restarted")

	// Everything that the API server has a kind for, by its strict validation.
	h.succeeds(t, "upgrade", "nmi", chart, "--force-conflicts", "--set=rbac.createUserFacingClusterRoles=true,admissionPolicies.warnings=true,admissionPolicies.exceptions=true",
		"--set=rbac.secrets.shop={cart-credentials},admissionPolicies.allowedIdentities.shop={"+cart.ClientID+"},nmi.extraArgs={--block-wireserver}")
	assert.Equal(t, before+1, generation())
	_, err = c.Kube.RbacV1().Roles("shop").Get(t.Context(), "nmi-service-principals", metav1.GetOptions{})
	require.NoError(t, err)

	h.succeeds(t, "upgrade", "nmi", chart, "--force-conflicts", "--set-json=admissionPolicies.allowedIdentities={}")
	_, err = c.Kube.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Get(t.Context(), "nmi-allowed-identities", metav1.GetOptions{})
	require.NoError(t, err)
	allowed, err := c.Kube.CoreV1().ConfigMaps("kube-system").Get(t.Context(), "nmi-allowed-identities", metav1.GetOptions{})
	require.NoError(t, err)
	assert.Empty(t, allowed.Data, "no identity is allowed")

	// As after "kubectl rollout undo": a field is kubectl's.
	h.kubectl(t, "-n", "kube-system", "set", "image", "daemonset/nmi", "nmi=other")
	out, err = h.run(t, "upgrade", "nmi", chart)
	require.Error(t, err)
	assert.Contains(t, out, "conflict occurred while applying object")

	ds, err := c.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	agent := ds.Spec.Template.Spec
	out = h.succeeds(t, "upgrade", "nmi", chart, "--force-conflicts", "--set=cleanup=true")
	assert.Contains(t, out, "rollout status daemonset/nmi-cleanup")
	list, err := c.Kube.AppsV1().DaemonSets("kube-system").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	require.Len(t, list.Items, 1, "the agent's DaemonSet is gone")
	assert.Equal(t, "nmi-cleanup", list.Items[0].Name)
	cleanup := list.Items[0].Spec.Template.Spec
	assert.Equal(t, agent.Tolerations, cleanup.Tolerations, "every node that the agent ran on")
	assert.Equal(t, agent.NodeSelector, cleanup.NodeSelector)
	assert.Equal(t, agent.Affinity, cleanup.Affinity)

	h.succeeds(t, "uninstall", "nmi")
	_, err = c.Custom.Resource(aadpodidentity.AzureIdentities).Namespace("shop").Get(t.Context(), "cart", metav1.GetOptions{})
	require.NoError(t, err, "definitions and objects stay")
	_, err = c.Kube.CoreV1().ServiceAccounts("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	assert.Error(t, err)

	h.succeeds(t, "install", "nmi", chart)
	h.kubectl(t, "-n", "kube-system", "delete", "secret", "-l", "owner=helm,name=nmi") // docs/migrating.md
	assert.NotContains(t, h.succeeds(t, "list", "--all-namespaces", "--short"), "nmi", "Helm has forgotten the release")
	_, err = c.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err, "its objects stay")
}

// kubectl runs kubectl as the administrator of the cluster.
func (h helm) kubectl(t *testing.T, args ...string) {
	t.Helper()
	root, err := testbed.Root()
	require.NoError(t, err)
	out, err := exec.CommandContext(t.Context(), filepath.Join(root, ".cache", "bin", "kubectl"), append([]string{"--kubeconfig=" + h.kubeconfig}, args...)...).CombinedOutput()
	require.NoError(t, err, string(out))
}

// TestHelmBesideTheOldNMI is why docs/migrating.md has kubectl for a DaemonSet of the same name: the
// fields of other programs stay in what Helm takes over.
func TestHelmBesideTheOldNMI(t *testing.T) {
	c, err := world.AddCluster(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	h := newHelm(t, c)
	old := filepath.Join(t.TempDir(), "old.yaml")
	require.NoError(t, os.WriteFile(old, []byte(oldDaemonSet("kube-system")), 0o600))
	require.NoError(t, c.Kube.AppsV1().DaemonSets("kube-system").Delete(t.Context(), "nmi", metav1.DeleteOptions{}))
	h.kubectl(t, "apply", "-f", old)
	text, err := h.run(t, "install", "nmi", chartForTestbed(t), "--take-ownership", "--force-conflicts")
	require.Error(t, err)
	assert.Contains(t, text, "may not specify more than 1 handler type")
}

// TestTwoReleases installs the chart a second time in one cluster, and has its agent manage another
// startup taint: the policy is for the account, the namespace and the taint of the release.
func TestTwoReleases(t *testing.T) {
	c, err := world.AddCluster(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	h, chart := newHelm(t, c), chartForTestbed(t)
	const all = "--set=admissionPolicies.warnings=true,admissionPolicies.exceptions=true,admissionPolicies.allowedIdentities.shop={a},rbac.createUserFacingClusterRoles=true"
	h.succeeds(t, "install", "nmi", chart, "--take-ownership", "--force-conflicts", all, "--set=startupTaint=example.com/first:NoSchedule")
	h.namespace = "identity"
	h.succeeds(t, "install", "second", chart, "--create-namespace", all, "--set=fullnameOverride=agent,startupTaint=example.com/second=starting:NoExecute")

	own := corev1.Taint{Key: "example.com/second", Value: "starting", Effect: corev1.TaintEffectNoExecute}
	other := corev1.Taint{Key: "example.com/first", Effect: corev1.TaintEffectNoSchedule}
	_, err = c.Kube.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: testbed.NodeName}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{own, other}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.Kube.CoreV1().Pods("identity").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "agent-x2x4z"},
		Spec:       corev1.PodSpec{NodeName: testbed.NodeName, ServiceAccountName: "agent", Containers: []corev1.Container{{Name: "nmi", Image: "podidentity/nmi"}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	kubeconfig, err := c.PodKubeconfig(t.Context(), "identity", "agent", "agent-x2x4z")
	require.NoError(t, err)
	s := begin(t)
	client := clientOf(t, kubeconfig)
	label := []byte(`{"metadata":{"labels":{"a":"b"}}}`)
	require.Eventually(t, func() bool {
		_, err := client.CoreV1().Nodes().Patch(context.Background(), testbed.NodeName, types.MergePatchType, label, metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err != nil && strings.Contains(err.Error(), "agent-startup-taint") && strings.Contains(err.Error(), "nothing but a taint of its node")
	}, patience, 50*time.Millisecond, "the policy of the release")
	taints := func() []corev1.Taint {
		node, err := c.Kube.CoreV1().Nodes().Get(t.Context(), testbed.NodeName, metav1.GetOptions{})
		require.NoError(t, err)
		return node.Spec.Taints
	}
	a := s.agentOf(kubeconfig, "--startup-taint="+own.ToString())
	require.NoError(t, a.AwaitReady(t.Context()))
	require.Eventually(t, func() bool { return !hasTaint(taints(), own) }, patience, 50*time.Millisecond, "the agent may remove it")
	s.stops(a)
	wrong := s.agentOf(kubeconfig, "--startup-taint="+other.ToString())
	s.says(wrong, "the agent may change no taint but example.com/second:NoExecute")
	assert.True(t, hasTaint(taints(), other))
	h.succeeds(t, "uninstall", "second")
	h.namespace = "kube-system"
	h.succeeds(t, "upgrade", "nmi", chart, "--force-conflicts", "--reuse-values") // its objects are all there
}

// TestOldObjects stores objects as aad-pod-identity's users and MIC wrote them, whatever their
// values: its definitions took them.
func TestOldObjects(t *testing.T) {
	// Serialized by MIC's Go types.
	empty := map[string]any{"creationTimestamp": nil}
	identity := map[string]any{
		"type": int64(1), "clientID": "not-a-guid", "tenantID": "", "resourceID": "", "adResourceID": "https://x", "adEndpoint": "https://login.example",
		"clientPassword": map[string]any{"name": "n", "namespace": "m"}, "auxiliaryTenantIDs": nil, "replicas": nil, "metadata": empty,
	}
	binding := map[string]any{"azureIdentity": "old", "selector": "", "weight": int64(7), "metadata": empty}
	reference := func(kind string, spec map[string]any) map[string]any {
		return map[string]any{
			"apiVersion": "aadpodidentity.k8s.io/v1", "kind": kind, "spec": spec,
			"metadata": map[string]any{"name": "old", "namespace": "shop", "creationTimestamp": nil, "annotations": map[string]any{"aadpodidentity.k8s.io/Behavior": "namespaced"}},
			"status":   map[string]any{"availableReplicas": int64(0), "metadata": empty},
		}
	}
	status := map[string]any{"availableReplicas": int64(1), "metadata": empty}
	objects := map[string]map[string]any{
		"AzureIdentity":             {"spec": identity, "status": status},
		"AzureIdentityBinding":      {"spec": binding, "status": status},
		"AzurePodIdentityException": {"spec": map[string]any{"podLabels": map[string]any{"app": "x"}, "metadata": empty}, "status": map[string]any{"status": "x", "metadata": empty}},
		"AzureAssignedIdentity": {"status": map[string]any{"status": "Assigned", "availableReplicas": int64(1), "metadata": empty}, "spec": map[string]any{
			"azureIdentityRef": reference("AzureIdentity", identity), "azureBindingRef": reference("AzureIdentityBinding", binding),
			"pod": "p", "podNamespace": "shop", "nodename": "n", "replicas": nil, "metadata": empty,
		}},
	}
	s := begin(t)
	for kind, fields := range objects {
		s.put(kind, "shop", "old", fields)
	}
	got, err := world.Custom.Resource(aadpodidentity.AzureAssignedIdentities).Namespace("shop").Get(t.Context(), "old", metav1.GetOptions{})
	require.NoError(t, err)
	name, _, _ := unstructured.NestedString(got.Object, "spec", "azureIdentityRef", "spec", "clientPassword", "name")
	assert.Equal(t, "n", name, "nothing is pruned")

	k := newKubectl(t, "kube-system")
	for short, columns := range map[string]string{"azid": "1 not-a-guid", "azidb": "old", "azaid": "p shop old n Assigned", "azpie": `{"app":"x"}`} {
		line := strings.Join(strings.Fields(k.sh(t, "kubectl -n shop get "+short+" old --no-headers")), " ")
		assert.True(t, strings.HasPrefix(line, "old "+columns+" "), "%s: %s", short, line)
	}
}
