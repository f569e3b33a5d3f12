//go:build e2e

package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

// kubectl runs commands of docs/migrating.md as the cluster's administrator, in a directory
// that deploy is in.
type kubectl struct {
	dir, doc, path string
	namespace      string   // of the agent's DaemonSet
	replaced       []string // in commands, pairs of old and new
}

func newKubectl(t *testing.T, namespace string) *kubectl {
	t.Helper()
	root, err := testbed.Root()
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(root, ".cache", "bin", "kubectl"), "run make kube")
	doc, err := os.ReadFile(filepath.Join(root, "docs", "migrating.md"))
	require.NoError(t, err)
	k := &kubectl{dir: t.TempDir(), doc: string(doc), path: filepath.Join(root, ".cache", "bin") + ":" + os.Getenv("PATH"), namespace: namespace}
	require.NoError(t, os.Symlink(filepath.Join(root, "deploy"), filepath.Join(k.dir, "deploy")))
	writeAdminKubeconfig(t, world, filepath.Join(k.dir, "kubeconfig"))
	k.restoresCluster(t)
	return k
}

// restoresCluster puts back, when the test ends, what other tests need: the manifests for managed
// mode, and the rights for both.
func (k *kubectl) restoresCluster(t *testing.T) {
	t.Helper()
	rbac := world.Kube.RbacV1()
	role, err := rbac.ClusterRoles().Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	t.Cleanup(func() {
		for _, namespace := range []string{"kube-system", "default"} {
			k.sh(t, "kubectl -n "+namespace+" delete daemonset nmi --ignore-not-found")
		}
		k.sh(t, "kubectl -n default delete azurepodidentityexception nmi-mic --ignore-not-found")
		k.sh(t, "kubectl delete clusterrolebinding nmi --ignore-not-found")
		k.sh(t, "kubectl apply --server-side --force-conflicts -f deploy/manifests")
		now, err := rbac.ClusterRoles().Get(context.Background(), "nmi", metav1.GetOptions{})
		require.NoError(t, err)
		now.Rules = role.Rules
		_, err = rbac.ClusterRoles().Update(context.Background(), now, metav1.UpdateOptions{})
		require.NoError(t, err)
	})
}

// useHelm lets commands call helm, as a user with this kubeconfig.
func (k *kubectl) useHelm(t *testing.T) {
	t.Helper()
	h := newHelm(t, world)
	require.NoError(t, os.Symlink(h.path, filepath.Join(k.dir, "helm")))
	k.path = k.dir + ":" + k.path
	// What the testbed has applied is not Helm's. The account stays, with which other tests run agents.
	k.sh(t, "kubectl -n kube-system delete --ignore-not-found daemonset/nmi azurepodidentityexception/nmi-aks-addons")
	k.sh(t, "kubectl delete clusterrole/nmi clusterrolebinding/nmi")
	k.replaced = append(k.replaced, "deploy/chart", chartForTestbed(t), "--namespace kube-system", "--create-namespace --namespace "+k.namespace)
	t.Cleanup(func() { k.sh(t, "helm --namespace "+k.namespace+" uninstall nmi --ignore-not-found") })
}

// sh runs a script, which must succeed, and returns what it prints.
func (k *kubectl) sh(t *testing.T, script string) string {
	t.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = k.dir
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(k.dir, "kubeconfig"), "HOME="+k.dir, "PATH="+k.path)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s\n%s", script, out)
	return string(out)
}

func (k *kubectl) apply(t *testing.T, manifest string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(k.dir, "old.yaml"), []byte(manifest), 0o600))
	k.sh(t, "kubectl -n kube-system delete daemonset nmi --ignore-not-found; kubectl apply -f old.yaml")
}

var codeBlock = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")

// block is the i-th block of a language below a heading, "" for commands.
func (k *kubectl) block(t *testing.T, heading, language string, i int) string {
	t.Helper()
	_, section, found := strings.Cut(k.doc, "# "+heading+"\n")
	require.True(t, found, heading)
	for _, block := range codeBlock.FindAllStringSubmatch(section, -1) {
		if block[1] != language {
			continue
		}
		if i == 0 {
			return block[2]
		}
		i--
	}
	require.Fail(t, "no such block", heading)
	return ""
}

// run runs a block of commands below a heading, but for those that wait for controllers.
func (k *kubectl) run(t *testing.T, heading string, i int) {
	t.Helper()
	lines := slices.DeleteFunc(slices.Collect(strings.Lines(k.block(t, heading, "", i))), func(line string) bool {
		return strings.Contains(line, " rollout status ")
	})
	k.sh(t, strings.NewReplacer(k.replaced...).Replace(strings.Join(lines, "")))
}

func (k *kubectl) daemonSet(t *testing.T) *appsv1.DaemonSet {
	t.Helper()
	ds, err := world.Kube.AppsV1().DaemonSets(k.namespace).Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	return ds
}

// agentKubeconfig has the rights of the agent's DaemonSet.
func (k *kubectl) agentKubeconfig(t *testing.T) string {
	t.Helper()
	path, err := world.ControlPlane.Kubeconfig(t.Context(), k.namespace, k.daemonSet(t).Spec.Template.Spec.ServiceAccountName)
	require.NoError(t, err)
	return path
}

// args are those of the DaemonSet that is in the cluster now, but for the node's name, which the
// testbed gives to each agent.
func (k *kubectl) args(t *testing.T) []string {
	t.Helper()
	ds := k.daemonSet(t)
	spec := ds.Spec.Template.Spec
	require.Len(t, spec.Containers, 1)
	assert.Equal(t, "nmi", spec.ServiceAccountName)
	assert.Equal(t, 1, ds.Spec.UpdateStrategy.RollingUpdate.MaxSurge.IntValue(), "beside the old one")
	assert.Empty(t, spec.Containers[0].Ports, "two pods cannot have one host port")
	return slices.DeleteFunc(slices.Clone(spec.Containers[0].Args), func(arg string) bool {
		return strings.HasPrefix(arg, "--node=")
	})
}
