//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// helm is Helm as the administrator of a cluster.
type helm struct{ path, kubeconfig string }

func newHelm(t *testing.T, c *testbed.World) helm {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "tool", "-modfile=../../.ci/helm/go.mod", "-n", "helm").Output()
	require.NoError(t, err)
	h := helm{strings.TrimSpace(string(out)), filepath.Join(t.TempDir(), "kubeconfig")}
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
	cmd := exec.CommandContext(t.Context(), h.path, append(args, "--namespace=kube-system")...)
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

	out = h.succeeds(t, "upgrade", "nmi", chart, "--force-conflicts", "--set=cleanup=true")
	assert.Contains(t, out, "rollout status daemonset/nmi-cleanup")
	list, err := c.Kube.AppsV1().DaemonSets("kube-system").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	require.Len(t, list.Items, 1, "the agent's DaemonSet is gone")
	assert.Equal(t, "nmi-cleanup", list.Items[0].Name)

	h.succeeds(t, "uninstall", "nmi")
	_, err = c.Custom.Resource(aadpodidentity.AzureIdentities).Namespace("shop").Get(t.Context(), "cart", metav1.GetOptions{})
	require.NoError(t, err, "definitions and objects stay")
	_, err = c.Kube.CoreV1().ServiceAccounts("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	assert.Error(t, err)
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
}
