//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Of the labels of exceptions in namespace shop: the second has team=Ops beside another
// label.
var (
	excepted = map[string]any{"team": "ops"}
	ordinary = map[string]any{"team": "opsx", "Team": "ops"}
)

// otherImage is the container of workload, with another image.
const otherImage = `{"name":"app","image":"example/app:2","imagePullPolicy":"Always"}`

// storeOldObjects makes what a cluster may have from before the policies.
func (c *admissionCluster) storeOldObjects(t *testing.T) {
	t.Helper()
	for _, object := range []*unstructured.Unstructured{
		newException("shop", "another", "app", "agent"),
		newCustom("AzurePodIdentityException", "shop", "old", map[string]any{"podLabels": map[string]any{"team": "Ops", "tier": "system"}}),
		newCustom("AzurePodIdentityException", "shop", "old-wide", map[string]any{"podLabels": map[string]any{"a": "b", "c": "d"}}),
		newCustom("AzurePodIdentityException", "shop", "old-empty", nil),
		workload("Pod", "old", excepted),
		workload("Deployment", "old", excepted),
		newIdentity("shop", "old-unlisted", managedSpec(unlisted, "")),
		newIdentity("shop", "old-invalid", managedSpec("cart\n", "subscriptions/s")),
		newBinding("shop", "old-invalid", "cart", ""),
	} {
		require.NoError(t, c.bob.create(object), "%s %s, before the policies", object.GetKind(), object.GetName())
	}
}

// workload makes an object of namespace shop that is a pod or has a pod template, with
// these labels on the pods.
func workload(kind, name string, labels map[string]any) *unstructured.Unstructured {
	containers := []any{map[string]any{"name": "app", "image": "example/app"}}
	pod := func(policy string) map[string]any {
		podLabels := map[string]any{"app": name}
		maps.Copy(podLabels, labels)
		return map[string]any{
			"metadata": map[string]any{"labels": podLabels},
			"spec":     map[string]any{"containers": containers, "restartPolicy": policy},
		}
	}
	selector := map[string]any{"matchLabels": map[string]any{"app": name}}
	object := &unstructured.Unstructured{Object: map[string]any{"kind": kind}}
	switch kind {
	case "Pod":
		object.Object = pod("Always")
		object.SetAPIVersion("v1")
		object.SetKind(kind)
	case "ReplicationController":
		object.SetAPIVersion("v1")
		object.Object["spec"] = map[string]any{"template": pod("Always")}
	case "Job":
		object.SetAPIVersion("batch/v1")
		object.Object["spec"] = map[string]any{"template": pod("Never")}
	case "CronJob":
		object.SetAPIVersion("batch/v1")
		object.Object["spec"] = map[string]any{"schedule": "@daily", "jobTemplate": map[string]any{"spec": map[string]any{"template": pod("Never")}}}
	case "ControllerRevision":
		object.SetAPIVersion("apps/v1")
		object.Object["revision"] = int64(1)
		object.Object["data"] = map[string]any{"spec": map[string]any{"template": pod("Always")}}
	default:
		object.SetAPIVersion("apps/v1")
		object.Object["spec"] = map[string]any{"selector": selector, "template": pod("Always")}
		if kind == "StatefulSet" {
			object.Object["spec"].(map[string]any)["serviceName"] = name
		}
	}
	object.SetNamespace("shop")
	object.SetName(name)
	return object
}

func (c *admissionCluster) testExceptions(t *testing.T) {
	refused(t, c.bob.create(newException("shop", "new", "a", "b")), "nmi-exceptions",
		"bob may not except pods of namespace shop", "ClusterRole nmi-except")
	require.NoError(t, c.alice.create(newException("bank", "new", "a", "b")))
	require.NoError(t, c.admin.create(newException("kube-system", "new", "a", "b")))
	require.NoError(t, c.carol.create(newException("shop", "new", "a", "b")))
	refused(t, c.carol.create(newException("bank", "other", "a", "b")), "nmi-exceptions", "carol may not except pods of namespace bank")

	old := newException("shop", "old-wide", "", "")
	for _, more := range []string{
		`{"spec":{"podLabels":{"e":"f"}}}`, `{"spec":{"podLabels":{"a":"x"}}}`, `{"spec":{"podLabels":{"a":"x","c":null}}}`,
	} {
		refused(t, c.bob.patch(old, more), "nmi-exceptions")
	}
	require.NoError(t, c.bob.patch(old, `{"metadata":{"annotations":{"note":"x"},"finalizers":["example.com/x"]}}`))
	require.NoError(t, c.bob.patch(old, `{"metadata":{"finalizers":null}}`))
	require.NoError(t, c.bob.patch(old, `{"spec":{"podLabels":{"c":null}}}`), "fewer labels")
	refused(t, c.bob.patch(newException("shop", "old-empty", "", ""), `{"spec":{"podLabels":{"a":"b"}}}`), "nmi-exceptions")
	require.NoError(t, c.carol.patch(old, `{"spec":{"podLabels":{"c":"d"}}}`))
	require.NoError(t, c.bob.remove(newException("shop", "new", "", "")))
}

func (c *admissionCluster) testExceptedPods(t *testing.T) {
	for name, labels := range map[string]map[string]any{
		"value in another case": {"team": "oPS"}, "one of several": {"tier": "system", "other": "x"}, "of another exception": {"app": "agent"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, c.bob.dryRun(workload("Pod", "new", labels)), "nmi-excepted-pods") })
	}
	refused(t, c.bob.create(workload("Pod", "new", excepted)), "nmi-excepted-pods",
		"the pod label team=ops matches AzurePodIdentityException old", "bob may not except pods of namespace shop", "ClusterRole nmi-except")
	require.NoError(t, c.bob.dryRun(workload("Pod", "new", ordinary)), "key in another case, and another value")
	require.NoError(t, c.carol.dryRun(workload("Pod", "new", excepted)))
	require.NoError(t, c.admin.dryRun(workload("Pod", "new", excepted)))
	elsewhere := workload("Pod", "new", excepted)
	elsewhere.SetNamespace("bank")
	require.NoError(t, c.bob.dryRun(elsewhere), "exceptions of other namespaces do not count")

	// An exception counts from when it is made until it is deleted.
	later := newException("shop", "later", "later", "x")
	require.NoError(t, c.bob.dryRun(workload("Pod", "new", map[string]any{"later": "x"})))
	require.NoError(t, c.alice.create(later))
	require.Eventually(t, func() bool { return c.bob.dryRun(workload("Pod", "new", map[string]any{"later": "x"})) != nil }, patience, 20*time.Millisecond)
	require.NoError(t, c.bob.remove(later))
	require.Eventually(t, func() bool { return c.bob.dryRun(workload("Pod", "new", map[string]any{"later": "x"})) == nil }, patience, 20*time.Millisecond)
}

func (c *admissionCluster) testExceptedTemplates(t *testing.T) {
	for _, kind := range []string{"Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job", "CronJob"} {
		t.Run(kind, func(t *testing.T) {
			refused(t, c.bob.dryRun(workload(kind, "new", excepted)), "nmi-excepted-pods", "team=ops matches AzurePodIdentityException old")
			require.NoError(t, c.bob.dryRun(workload(kind, "new", ordinary)))
			require.NoError(t, c.alice.dryRun(workload(kind, "new", excepted)))
		})
	}
}

// testRevisions is for revisions of StatefulSets: the controller merges one into its
// StatefulSet, whose labels it need not repeat, and reads its fields in any case.
func (c *admissionCluster) testRevisions(t *testing.T) {
	for name, data := range map[string]string{
		"no labels":       `{"spec":{"template":{"spec":{"containers":[` + otherImage + `]}}}}`,
		"in another case": `{"spec":{"template":{"$patch":"replace","Metadata":{"labels":{"team":"ops"}},"spec":{"containers":[` + otherImage + `]}}}}`,
		"labels":          `{"spec":{"template":{"metadata":{"labels":{"team":"ops"}}}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			revision := workload("ControllerRevision", "new", nil)
			var content map[string]any
			require.NoError(t, json.Unmarshal([]byte(data), &content))
			revision.Object["data"] = content
			refused(t, c.bob.dryRun(revision), "nmi-excepted-pods", "bob may not except pods of namespace shop")
			require.NoError(t, c.carol.dryRun(revision))
		})
	}
	stored := workload("ControllerRevision", "stored", nil)
	require.NoError(t, c.carol.create(stored))
	require.NoError(t, c.bob.patch(stored, `{"metadata":{"annotations":{"note":"x"}}}`))
	require.Error(t, c.bob.patch(stored, `{"data":{"spec":null}}`), "immutable")

	elsewhere := workload("ControllerRevision", "new", excepted)
	elsewhere.SetNamespace("bank")
	refused(t, c.bob.dryRun(elsewhere), "nmi-excepted-pods")
	require.NoError(t, c.bob.remove(newException("bank", "new", "", "")))
	require.Eventually(t, func() bool { return c.bob.dryRun(elsewhere) == nil }, patience, 20*time.Millisecond, "no exceptions there")
}

// testLabelUpdates is for pods and templates that get the label after their creation, in
// each way that the API server has for it.
func (c *admissionCluster) testLabelUpdates(t *testing.T) {
	const labels = `{"metadata":{"labels":{"team":"ops"}}}`
	pod := workload("Pod", "plain", ordinary)
	require.NoError(t, c.bob.create(pod))
	refused(t, c.bob.patch(pod, labels), "nmi-excepted-pods")
	refused(t, c.bob.patch(pod, labels, "status"), "nmi-excepted-pods")
	require.NoError(t, c.bob.patch(pod, `{"metadata":{"labels":{"other":"x"}}}`))

	target := corev1.ObjectReference{Kind: "Node", Name: testbed.NodeName}
	bind := func(u *apiUser, name string, labels map[string]string) error {
		return u.kube.CoreV1().Pods("shop").Bind(t.Context(), &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Target: target}, metav1.CreateOptions{})
	}
	refused(t, bind(c.bob, "plain", map[string]string{"team": "ops"}), "nmi-excepted-pods")
	refused(t, c.bob.create(&unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Binding", "target": map[string]any{"kind": "Node", "name": target.Name},
		"metadata": map[string]any{"namespace": "shop", "name": "plain", "labels": excepted},
	}}), "nmi-excepted-pods")
	require.NoError(t, bind(c.bob, "plain", nil))
	second := workload("Pod", "second", ordinary)
	require.NoError(t, c.bob.create(second))
	require.NoError(t, bind(c.alice, "second", map[string]string{"team": "ops"}))
	got, err := c.Kube.CoreV1().Pods("shop").Get(t.Context(), "second", metav1.GetOptions{})
	require.NoError(t, err)
	assert.Equal(t, "ops", got.Labels["team"], "a Binding's labels are the pod's")

	deployment := workload("Deployment", "plain", ordinary)
	require.NoError(t, c.bob.create(deployment))
	refused(t, c.bob.patch(deployment, `{"spec":{"template":`+labels+`}}`), "nmi-excepted-pods")
	require.NoError(t, c.bob.patch(deployment, labels), "the Deployment's own labels are not its pods'")
	cronJob := workload("CronJob", "plain", ordinary)
	require.NoError(t, c.bob.create(cronJob))
	refused(t, c.bob.patch(cronJob, `{"spec":{"jobTemplate":{"spec":{"template":`+labels+`}}}}`), "nmi-excepted-pods")
}

// testControllers is for what Kubernetes itself writes after an author was allowed to.
func (c *admissionCluster) testControllers(t *testing.T) {
	for controller, kind := range map[string]string{
		"replicaset-controller": "Pod", "replication-controller": "Pod", "statefulset-controller": "Pod", "daemon-set-controller": "Pod", "job-controller": "Pod",
		"deployment-controller": "ReplicaSet", "cronjob-controller": "Job",
	} {
		u := c.user(t, "system:serviceaccount:kube-system:"+controller)
		require.NoError(t, u.dryRun(workload(kind, "made", excepted)), controller)
	}
	for _, controller := range []string{"statefulset-controller", "daemon-set-controller"} {
		u := c.user(t, "system:serviceaccount:kube-system:"+controller)
		require.NoError(t, u.dryRun(workload("ControllerRevision", "made", excepted)), controller)
	}
	require.NoError(t, c.user(t, "system:kube-controller-manager", "system:masters").dryRun(workload("Pod", "made", excepted)))

	// A service account of that name in a namespace of bob's is another subject.
	c.grant(t, "shop", everything, "system:serviceaccount:shop:replicaset-controller")
	refused(t, c.user(t, "system:serviceaccount:shop:replicaset-controller").dryRun(workload("Pod", "made", excepted)), "nmi-excepted-pods")

	// A kubelet: statuses, and mirror pods.
	c.grant(t, "shop", everything, "system:node:node1")
	kubelet := c.user(t, "system:node:node1", "system:nodes")
	require.NoError(t, kubelet.patch(workload("Pod", "old", nil), `{"status":{"phase":"Running"}}`, "status"))
	require.NoError(t, kubelet.dryRun(workload("Pod", "mirror", excepted)))
	refused(t, c.user(t, "system:node:node1").dryRun(workload("Pod", "mirror", excepted)), "nmi-excepted-pods")
}

// testStoredExceptedPods is for pods and workloads that were excepted before the policies
// came: their namespace's users can go on with them, but not run something else in them.
func (c *admissionCluster) testStoredExceptedPods(t *testing.T) {
	pod, deployment := workload("Pod", "old", nil), workload("Deployment", "old", nil)
	require.NoError(t, c.bob.patch(pod, `{"metadata":{"annotations":{"note":"x"},"finalizers":["example.com/x"]}}`))
	require.NoError(t, c.bob.patch(pod, `{"metadata":{"finalizers":null}}`))
	require.NoError(t, c.bob.patch(pod, `{"status":{"message":"x"}}`, "status"))
	refused(t, c.bob.patch(pod, `{"spec":{"containers":[`+otherImage+`]}}`), "nmi-excepted-pods")
	refused(t, c.bob.patch(pod, `{"spec":{"ephemeralContainers":[{"name":"debug","image":"example/app"}]}}`, "ephemeralcontainers"), "nmi-excepted-pods")
	refused(t, c.bob.patch(pod, `{"metadata":{"labels":{"team":"OPS"}}}`), "nmi-excepted-pods")
	require.NoError(t, c.bob.patch(pod, `{"metadata":{"labels":{"team":null}}}`), "it is excepted no more")

	require.NoError(t, c.bob.patch(deployment, `{"spec":{"replicas":3}}`))
	require.NoError(t, c.bob.patch(deployment, `{"spec":{"replicas":4}}`, "scale"))
	require.NoError(t, c.bob.patch(deployment, `{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"now"}}}}}`))
	change := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[%s]}}}}`, otherImage)
	refused(t, c.bob.patch(deployment, change), "nmi-excepted-pods")
	require.NoError(t, c.carol.patch(deployment, change))
	require.NoError(t, c.bob.remove(pod))
	require.NoError(t, c.bob.remove(deployment))
}
