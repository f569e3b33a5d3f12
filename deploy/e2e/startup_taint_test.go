//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podidentity/nmi/deploy/testbed"
)

// The startup taint of deploy/admission/startup-taint.yaml.
var startupTaint = corev1.Taint{Key: "startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready", Value: "true", Effect: corev1.TaintEffectNoSchedule}

const startupTaintFlag = "--startup-taint=startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready=true:NoSchedule"

const taintPolicy = "nmi-startup-taint"

// taintedNode is the node's object and the agent's credentials: the token of a pod of the
// DaemonSet, and the rights of deploy/admission/startup-taint.yaml.
type taintedNode struct {
	*scenario
	kubeconfig string               // of the agent's pod
	client     kubernetes.Interface // with that
	other      corev1.Taint         // somebody else's
}

// taintedNode makes the node with the startup taint and somebody else's.
func (s *scenario) taintedNode() *taintedNode {
	s.t.Helper()
	ctx := s.t.Context()
	n := &taintedNode{scenario: s, other: corev1.Taint{Key: "dedicated", Value: "gpu", Effect: corev1.TaintEffectNoExecute}}
	s.applyTaintPolicy()
	for _, name := range []string{testbed.NodeName, "node2"} {
		s.createNode(name, n.other)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "nmi-x2x4z"},
		Spec:       corev1.PodSpec{NodeName: testbed.NodeName, ServiceAccountName: "nmi", Containers: []corev1.Container{{Name: "nmi", Image: "podidentity/nmi"}}},
	}
	_, err := world.Kube.CoreV1().Pods("kube-system").Create(ctx, pod, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, world.DeletePod(context.Background(), "kube-system", pod.Name)) })
	n.kubeconfig, err = world.PodKubeconfig(ctx, "kube-system", "nmi", pod.Name)
	require.NoError(s.t, err)
	n.client = clientOf(s.t, n.kubeconfig)
	s.awaitPolicy(n.client)
	// Not before: an agent that runs already might remove it by the right that the policy limits.
	for _, name := range []string{testbed.NodeName, "node2"} {
		node, err := world.Kube.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		require.NoError(s.t, err)
		node.Spec.Taints = append(node.Spec.Taints, startupTaint)
		_, err = world.Kube.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{})
		require.NoError(s.t, err)
	}
	return n
}

// createNode makes the object of a node until the test ends.
func (s *scenario) createNode(name string, taints ...corev1.Taint) {
	s.t.Helper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints}}
	_, err := world.Kube.CoreV1().Nodes().Create(s.t.Context(), node, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		assert.NoError(s.t, world.Kube.CoreV1().Nodes().Delete(context.Background(), name, metav1.DeleteOptions{}))
	})
}

func clientOf(t *testing.T, kubeconfig string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	require.NoError(t, err)
	config.QPS, config.Burst = 1000, 1000
	client, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return client
}

// applyTaintPolicy applies the manifest as it is, until the test ends.
func (s *scenario) applyTaintPolicy() {
	s.t.Helper()
	manifests, err := testbed.ReadManifests(os.DirFS(filepath.Join("..", "admission")), "startup-taint.yaml")
	require.NoError(s.t, err)
	require.NoError(s.t, testbed.Apply(s.t.Context(), world.Custom, manifests))
	s.t.Cleanup(func() {
		for i := len(manifests) - 1; i >= 0; i-- { // the rights before the policy
			gvk := manifests[i].GroupVersionKind()
			plural := map[string]string{
				"ValidatingAdmissionPolicy": "validatingadmissionpolicies", "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
				"ClusterRole": "clusterroles", "ClusterRoleBinding": "clusterrolebindings",
			}[gvk.Kind]
			resource := schema.GroupVersionResource{Group: gvk.Group, Version: gvk.Version, Resource: plural}
			assert.NoError(s.t, world.Custom.Resource(resource).Delete(context.Background(), manifests[i].GetName(), metav1.DeleteOptions{}))
		}
	})
}

// awaitPolicy waits until the agent has its rights and the policy limits them.
func (s *scenario) awaitPolicy(client kubernetes.Interface) {
	s.t.Helper()
	label := func() error {
		ctx, cancel := requestContext()
		defer cancel()
		_, err := client.CoreV1().Nodes().Patch(ctx, testbed.NodeName, types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	require.Eventually(s.t, func() bool { err := label(); return err != nil && strings.Contains(err.Error(), taintPolicy) }, patience, 50*time.Millisecond)
}

// starts starts an agent that manages the taint.
func (n *taintedNode) starts(flags ...string) *testbed.Agent {
	n.t.Helper()
	a, err := testbed.StartAgent(n.kubeconfig, append(flags, startupTaintFlag)...)
	require.NoError(n.t, err)
	n.endsWell(a)
	return a
}

func (s *scenario) taints() []corev1.Taint {
	s.t.Helper()
	ctx, cancel := requestContext()
	defer cancel()
	node, err := world.Kube.CoreV1().Nodes().Get(ctx, testbed.NodeName, metav1.GetOptions{})
	require.NoError(s.t, err)
	return node.Spec.Taints
}

func hasTaint(taints []corev1.Taint, taint corev1.Taint) bool {
	for i := range taints {
		if taints[i].MatchTaint(&taint) {
			return true
		}
	}
	return false
}

// hasOwn reports whether the node has the startup taint. Somebody else's must be there.
func (n *taintedNode) hasOwn() bool {
	n.t.Helper()
	taints := n.taints()
	require.True(n.t, hasTaint(taints, n.other), "somebody else's taint was lost: %v", taints)
	return hasTaint(taints, startupTaint)
}

func (n *taintedNode) awaitOwn(present bool) {
	n.t.Helper()
	require.Eventually(n.t, func() bool { return n.hasOwn() == present }, 2*patience, 50*time.Millisecond, "the startup taint; want it there: %t", present)
}

// update changes the node as its administrator would.
func (n *taintedNode) update(change func(*corev1.Node)) error {
	for {
		ctx, cancel := requestContext()
		nodes := world.Kube.CoreV1().Nodes()
		node, err := nodes.Get(ctx, testbed.NodeName, metav1.GetOptions{})
		if err == nil {
			change(node)
			_, err = nodes.Update(ctx, node, metav1.UpdateOptions{})
		}
		cancel()
		if !apierrors.IsConflict(err) {
			return err
		}
	}
}

func addTaint(taint corev1.Taint) func(*corev1.Node) {
	return func(node *corev1.Node) {
		if !hasTaint(node.Spec.Taints, taint) {
			node.Spec.Taints = append(node.Spec.Taints, taint)
		}
	}
}

func TestStartupTaintGoesWhenTheAgentIsReady(t *testing.T) {
	s := begin(t)
	n := s.taintedNode()
	restore, err := world.RemoveDefinition(t.Context(), "azureidentitybindings.aadpodidentity.k8s.io")
	require.NoError(t, err)
	a := n.starts()
	s.says(a, "iptables rules put in place")
	for range 30 { // 3 s, in which the agent looks three times
		require.True(t, n.hasOwn(), "removed by an agent that is not ready")
		time.Sleep(100 * time.Millisecond)
	}
	require.NoError(t, restore(t.Context()))
	require.NoError(t, world.Bind(t.Context(), "shop", "cart", cart), "it went with its definition")
	require.NoError(t, world.Bind(t.Context(), "shop", "report", report))
	require.NoError(t, a.AwaitReady(t.Context()))
	n.awaitOwn(false)

	for range 3 {
		require.NoError(t, n.update(addTaint(startupTaint)))
		n.awaitOwn(false)
	}
	another := startupTaint
	another.Value = "another"
	require.NoError(t, n.update(addTaint(another)), "key and effect count, as for Kubernetes")
	n.awaitOwn(false)
	assert.Equal(t, 5, strings.Count(a.Log(), "removed the startup taint"), "one line each")

	s.stops(a)
	assert.False(t, n.hasOwn(), "an agent that stops changes nothing: its rules stay")
}

// Two programs change the list all the time; neither may lose what the other has written.
func TestStartupTaintBesideAnotherWriter(t *testing.T) {
	s := begin(t)
	n := s.taintedNode()
	a := n.starts()
	require.NoError(t, a.AwaitReady(t.Context()))
	n.awaitOwn(false)
	const key, writes = "e2e/counter", 500
	last, lost := 0, 0
	for i := range writes {
		require.NoError(t, n.update(func(node *corev1.Node) {
			found, taints := 0, []corev1.Taint(nil)
			for _, taint := range node.Spec.Taints {
				if taint.Key == key {
					found, _ = strconv.Atoi(taint.Value)
				} else {
					taints = append(taints, taint)
				}
			}
			if found != last {
				lost++
			}
			node.Spec.Taints = append(taints, corev1.Taint{Key: key, Value: strconv.Itoa(i + 1), Effect: corev1.TaintEffectNoSchedule})
			addTaint(startupTaint)(node)
		}))
		last = i + 1
	}
	assert.Zero(t, lost, "writes that the agent undid")
	n.awaitOwn(false)
	assert.True(t, hasTaint(n.taints(), corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule}))
	t.Logf("%d writes, the agent removed its taint %d times", writes, strings.Count(a.Log(), "removed the startup taint"))
	assert.NotContains(t, a.Log(), "cannot be managed", "conflicts are no news")
}

func TestStartupTaintComesBackWhileRulesCannotBeWritten(t *testing.T) {
	s := begin(t)
	n := s.taintedNode()
	bin := t.TempDir()
	refuse := filepath.Join(bin, "refuse")
	restore, err := filepath.EvalSymlinks("/usr/sbin/iptables-nft-restore")
	require.NoError(t, err)
	writeScript(t, bin+"/iptables-nft-restore", fmt.Sprintf(`[ -e %s ] && { echo no >&2; exit 4; }; exec -a iptables-nft-restore %s "$@"`, refuse, restore))
	writeScript(t, bin+"/iptables-nft", `exec /usr/sbin/iptables-nft "$@"`)
	before := os.Getenv("PATH")
	require.NoError(t, os.Setenv("PATH", bin+":/usr/sbin:/usr/bin:/sbin:/bin"))
	a := n.starts("--iptables-backend=nft")
	require.NoError(t, os.Setenv("PATH", before))
	require.NoError(t, a.AwaitReady(t.Context()))
	n.awaitOwn(false)

	require.NoError(t, os.WriteFile(refuse, nil, 0o600))
	s.command("iptables-nft", "-t", "nat", "-F", "aad-metadata")
	lost := time.Now()
	n.awaitOwn(true)
	assert.Greater(t, time.Since(lost), 15*time.Second, "not for a failure that passes")
	s.says(a, "set the startup taint")
	require.NoError(t, os.Remove(refuse))
	s.command("iptables-nft", "-t", "nat", "-N", "e2e-event") // so that it looks at once
	s.command("iptables-nft", "-t", "nat", "-X", "e2e-event")
	require.NoError(t, a.AwaitReady(t.Context()))
	n.awaitOwn(false)
}

func TestStartupTaintWithoutTheRights(t *testing.T) {
	s := begin(t)
	s.agent(startupTaintFlag) // ready all the same
	a := s.successor(startupTaintFlag)
	s.says(a, "the startup taint cannot be managed; retrying")
	status, text := a.Ready(t.Context())
	assert.Equal(t, 200, status)
	assert.Contains(t, text, "apply deploy/admission/startup-taint.yaml")
	n := s.taintedNode()
	require.Eventually(t, func() bool {
		_, text := a.Ready(t.Context())
		return strings.Contains(text, "may change no node but its own, with the token of its own pod")
	}, 2*patience, 100*time.Millisecond, "rights to watch, and a token of no pod")
	assert.True(t, n.hasOwn())
	assert.LessOrEqual(t, strings.Count(a.Log(), "cannot be managed"), 3, "a line for each cause:\n%s", a.Log())
}

func TestStartupTaintPolicy(t *testing.T) {
	s := begin(t)
	n := s.taintedNode()
	nodes := n.client.CoreV1().Nodes()
	patch := func(node, patch string, subresources ...string) error {
		_, err := nodes.Patch(t.Context(), node, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, subresources...)
		return err
	}
	spec := func(taints ...string) string { return `{"spec":{"taints":[` + strings.Join(taints, ",") + `]}}` }
	const (
		own     = `{"key":"startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready","value":"true","effect":"NoSchedule"}`
		evicts  = `{"key":"startup-taint.cluster-autoscaler.kubernetes.io/nmi-not-ready","value":"true","effect":"NoExecute"}`
		other   = `{"key":"dedicated","value":"gpu","effect":"NoExecute"}`
		changed = `{"key":"dedicated","value":"cpu","effect":"NoExecute"}`
		more    = `{"key":"more","effect":"NoSchedule"}`
	)
	// A node has these two taints before, and beside them the one that the API server gives
	// to new nodes.
	fresh, err := world.Kube.CoreV1().Nodes().Get(t.Context(), testbed.NodeName, metav1.GetOptions{})
	require.NoError(t, err)
	keep := []string{other}
	for _, taint := range fresh.Spec.Taints {
		if taint.Key != n.other.Key && taint.Key != startupTaint.Key {
			keep = append(keep, fmt.Sprintf(`{"key":%q,"value":%q,"effect":%q}`, taint.Key, taint.Value, taint.Effect))
		}
	}
	with := func(taints ...string) string { return spec(append(append([]string{}, keep...), taints...)...) }

	require.NoError(t, patch(testbed.NodeName, with()), "its own taint removed")
	require.NoError(t, patch(testbed.NodeName, with(own)), "and set")
	require.NoError(t, patch(testbed.NodeName, with(own)), "and left")
	for name, body := range map[string]string{
		"another taint set":          with(own, more),
		"another effect":             with(own, evicts),
		"another taint changed":      spec(append([]string{changed, own}, keep[1:]...)...),
		"another taint removed":      spec(append([]string{own}, keep[1:]...)...),
		"all taints removed":         `{"spec":{"taints":null}}`,
		"cordoned":                   `{"spec":{"unschedulable":true}}`,
		"a provider ID":              `{"spec":{"providerID":"azure:///x"}}`,
		"a label":                    `{"metadata":{"labels":{"a":"b"}}}`,
		"an annotation":              `{"metadata":{"annotations":{"a":"b"}}}`,
		"a finalizer":                `{"metadata":{"finalizers":["example.com/a"]}}`,
		"an owner":                   `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"a","uid":"b"}]}}`,
		"its own taint with a label": `{"metadata":{"labels":{"a":"b"}},` + strings.TrimPrefix(with(), "{"),
	} {
		refused(t, patch(testbed.NodeName, body), taintPolicy)
		if t.Failed() {
			require.Fail(t, name)
		}
	}
	refused(t, patch("node2", with()), taintPolicy, "no node but its own")
	refused(t, func() error {
		_, err := clientOf(t, world.Kubeconfig).CoreV1().Nodes().Patch(t.Context(), testbed.NodeName, types.MergePatchType, []byte(with()), metav1.PatchOptions{})
		return err
	}(), taintPolicy, "with the token of its own pod")
	assert.True(t, apierrors.IsForbidden(patch(testbed.NodeName, `{"status":{"phase":"Running"}}`, "status")), "RBAC")
	assert.True(t, apierrors.IsForbidden(nodes.Delete(t.Context(), testbed.NodeName, metav1.DeleteOptions{})), "RBAC")
	require.NoError(t, n.update(func(node *corev1.Node) { node.Labels = map[string]string{"e2e": "yes"} }), "others are not limited")

	// With more rights than the manifest gives, the policy still holds.
	c := &admissionCluster{World: world}
	admin := "e2e:system:serviceaccount:kube-system:nmi"
	t.Cleanup(func() {
		ctx := context.Background()
		assert.NoError(t, errors.Join(world.Kube.RbacV1().ClusterRoleBindings().Delete(ctx, admin, metav1.DeleteOptions{}), world.Kube.RbacV1().ClusterRoles().Delete(ctx, admin, metav1.DeleteOptions{})))
	})
	c.grant(t, "", everything, "system:serviceaccount:kube-system:nmi")
	refused(t, patch(testbed.NodeName, `{"status":{"phase":"Running"}}`, "status"), taintPolicy)
	refused(t, nodes.Delete(t.Context(), testbed.NodeName, metav1.DeleteOptions{}), taintPolicy)
	_, err = nodes.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node3"}}, metav1.CreateOptions{})
	refused(t, err, taintPolicy)
	assert.True(t, n.hasOwn())
}
