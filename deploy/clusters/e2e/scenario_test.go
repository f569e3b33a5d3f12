//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// scenario is one test, see the package comment.
type scenario struct {
	t         *testing.T
	namespace string
	pods      []*runningPod
	result    *result
	// failuresAllowed is why requests may fail; "" if none may.
	failuresAllowed string
	addresses       *addresses // nil if pods must be served however late the kubelet reports them
	early           int        // failed requests that addresses allows
}

// need is what a scenario needs besides Kubernetes's API.
type need string

const (
	theNode need = "commands on the node (NMI_CLUSTER)"
	theIMDS need = "the fake metadata service (NMI_IMDS)"
)

// begin begins a scenario. What it promises is for the table of results.
func begin(t *testing.T, promise string, needs ...need) *scenario {
	t.Helper()
	s := &scenario{t: t, result: addResult(t, promise)}
	for _, n := range needs {
		if (n == theNode && world.script == "") || (n == theIMDS && world.imds == nil) {
			s.skip("needs " + string(n))
		}
	}
	if world.imds != nil {
		require.NoError(t, world.imds.Reset(t.Context()))
	}
	s.namespace = s.createNamespace()
	begun := time.Now()
	t.Cleanup(func() {
		s.judge()
		s.deleteNamespace()
		s.result.Seconds = time.Since(begun).Seconds()
		if !t.Failed() && !t.Skipped() {
			s.result.Outcome = "passed"
		}
	})
	return s
}

func (s *scenario) skip(why string) {
	s.t.Helper()
	s.result.Outcome = "skipped: " + why
	s.t.Skip(why)
}

// createNamespace makes a namespace in which pods can be created.
func (s *scenario) createNamespace() string {
	s.t.Helper()
	ns, err := world.kube.CoreV1().Namespaces().Create(s.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "nmi-e2e-"}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.eventually("the namespace's service account", func() bool {
		_, err := world.kube.CoreV1().ServiceAccounts(ns.Name).Get(s.t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	return ns.Name
}

// deleteNamespace waits for the end of the pods, so that none asks during the next
// scenario.
func (s *scenario) deleteNamespace() {
	s.t.Helper()
	ctx := context.Background() // that of the test is over
	assert.NoError(s.t, world.kube.CoreV1().Namespaces().Delete(ctx, s.namespace, metav1.DeleteOptions{}))
	s.eventually("the end of its pods", func() bool {
		pods, err := world.kube.CoreV1().Pods(s.namespace).List(ctx, metav1.ListOptions{})
		return err == nil && len(pods.Items) == 0
	})
}

// eventually waits for a condition.
func (s *scenario) eventually(what string, condition func() bool) {
	s.t.Helper()
	require.Eventually(s.t, condition, patience, 50*time.Millisecond, what)
}

// note adds a line to the results.
func (s *scenario) note(format string, args ...any) {
	s.result.Notes = append(s.result.Notes, fmt.Sprintf(format, args...))
}

// allowFailures has failed requests counted, and not fail the scenario. Tokens of another
// identity always do.
func (s *scenario) allowFailures(why string) { s.failuresAllowed = why }

// onNode runs a command on the node, and returns what it printed.
func (s *scenario) onNode(args ...string) string {
	s.t.Helper()
	return s.run(world.script, append([]string{"exec"}, args...)...)
}

// kubectl runs kubectl as the administrator, and returns what it printed.
func (s *scenario) kubectl(args ...string) string {
	s.t.Helper()
	return s.run("kubectl", args...)
}

func (s *scenario) run(name string, args ...string) string {
	s.t.Helper()
	out, err := world.command(s.t.Context(), name, args...)
	require.NoError(s.t, err)
	return strings.TrimSpace(out)
}

// imds returns what the metadata service counted since the scenario began.
func (s *scenario) imds() control.Counts {
	s.t.Helper()
	counts, err := world.imds.Counts(context.Background())
	require.NoError(s.t, err)
	return counts
}

// bind makes an identity in the namespace, and binds it to the pods with this value of
// the label aadpodidbinding.
func (s *scenario) bind(selector string, id imdstest.Identity) {
	s.t.Helper()
	name := id.ResourceID[strings.LastIndex(id.ResourceID, "/")+1:]
	s.create("AzureIdentity", name, map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID})
	s.bindTo(selector, name)
}

func (s *scenario) bindTo(selector, identity string) {
	s.t.Helper()
	s.create("AzureIdentityBinding", selector+"-"+identity, map[string]any{"azureIdentity": identity, "selector": selector})
}

// except makes an exception for the pods with a label.
func (s *scenario) except(name, label, value string) {
	s.t.Helper()
	s.create("AzurePodIdentityException", name, map[string]any{"podLabels": map[string]any{label: value}})
}

// create makes an object of aad-pod-identity's in the namespace.
func (s *scenario) create(kind, name string, spec map[string]any) {
	s.t.Helper()
	object := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	object.SetGroupVersionKind(aadpodidentity.GroupVersion.WithKind(kind))
	object.SetName(name)
	resource, _ := meta.UnsafeGuessKindToResource(object.GroupVersionKind())
	_, err := world.custom.Resource(resource).Namespace(s.namespace).Create(s.t.Context(), object, metav1.CreateOptions{})
	require.NoError(s.t, err)
}
