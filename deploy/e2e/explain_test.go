//go:build e2e

package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

// explains runs nmi explain as in an agent's pod, or with this kubeconfig elsewhere. It must
// not take long: there is nothing to wait for.
func (s *scenario) explains(kubeconfig string, args ...string) (code int, output string) {
	s.t.Helper()
	begin := time.Now()
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + kubeconfig}, append([]string{"explain"}, args...)...)
	require.NoError(s.t, err)
	assert.Less(s.t, time.Since(begin), 10*time.Second, output)
	assert.NotContains(s.t, output, "context canceled")
	assert.NotContains(s.t, output, "level=")
	return code, output
}

func TestExplainInAnAgentsPod(t *testing.T) {
	s := begin(t)
	a := s.agent("--operation-mode=standard", "--deny-identity="+third.ClientID)
	s.identity("shop", "third", third)
	s.binding("shop", "third", "third", "third")
	s.pod("here-0", "10.244.0.71", testbed.Ptp, "cart")
	s.object("shop", "denied-0", "10.244.0.72", map[string]string{"aadpodidbinding": "third"})
	_, err := world.Kube.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "elsewhere-0", Labels: map[string]string{"aadpodidbinding": "cart"}},
		Spec:       corev1.PodSpec{NodeName: "node2", Containers: []corev1.Container{{Name: "app", Image: "example/app"}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = world.DeletePod(t.Context(), "shop", "elsewhere-0") })
	socket := "--probe-socket=" + a.ProbeSocket

	var output string
	explains := func(args ...string) string {
		code, text := s.explains(world.Kubeconfig, args...)
		assert.Zero(t, code, text)
		return text
	}
	require.Eventually(t, func() bool { // the agent has heard of the pod
		output = explains(socket, "shop/here-0")
		return !strings.Contains(output, "by the objects of the cluster")
	}, patience, 100*time.Millisecond)
	assert.Contains(t, output, "is answered 503 temporarily_unavailable: The identity is not assigned to the pod yet")
	assert.Contains(t, output, "will get AzureIdentity shop/cart")
	assert.Contains(t, explains(socket, "--operation-mode=standard", "--deny-identity="+third.ClientID, "shop/here-0"), output, "the same flags as the agent's")

	output = explains(socket, "shop/denied-0")
	assert.Contains(t, output, "denied by --deny-identity", "with the agent's flags")

	output = explains(socket, "shop/elsewhere-0") // by the cluster, in the agent's mode
	assert.Contains(t, output, "its status has no address")
	assert.Contains(t, output, "will get AzureIdentity shop/cart")
	assert.Contains(t, output, "(by the objects of the cluster, in standard mode; what the agent of node node2 knows")

	output = explains(socket, "--operation-mode=managed", "shop/here-0")
	assert.Contains(t, output, "note: the agent of this pod runs with other flags than these (--operation-mode)")
	assert.Contains(t, output, "gets by default AzureIdentity shop/cart")

	code, output := s.explains(world.Kubeconfig, socket, "shop/nobody")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "nmi: pod shop/nobody not found")
}

func TestExplainSaysWhatThePodIsAnswered(t *testing.T) {
	s := begin(t)
	a := s.agent("--pod-wait=100ms")
	p := s.pod("twin-a", "10.244.0.73", testbed.Ptp, "cart")
	p.hears(vault, cart.ClientID)
	socket := "--probe-socket=" + a.ProbeSocket
	_, output := s.explains(world.Kubeconfig, socket, "shop/twin-a")
	assert.Contains(t, output, "\ngets by default AzureIdentity shop/cart")

	s.object("shop", "twin-b", "10.244.0.73", map[string]string{"aadpodidbinding": "cart"})
	p.hearsNotYet()
	got := p.asks(vault)
	require.Equal(t, 503, got.status)
	_, output = s.explains(world.Kubeconfig, socket, "shop/twin-a")
	assert.Contains(t, output, "\nis answered 503 temporarily_unavailable: The address is claimed by more than one pod\nwould get AzureIdentity shop/cart")
	assert.Contains(t, output, "): shop/twin-")
	_, output = s.explains(world.Kubeconfig, "--operation-mode=managed", "shop/twin-a")
	assert.Contains(t, output, "\nis answered 503 temporarily_unavailable: The address is claimed by more than one pod\n", "without the agent, too")
	require.NoError(t, world.DeletePod(t.Context(), "shop", "twin-b"))
	p.hears(vault, cart.ClientID)
}

// A permission that is missing is known with the first answer; a mode is not guessed.
func TestExplainWithoutAnAgent(t *testing.T) {
	s := begin(t)
	s.object("shop", "lonely-0", "10.244.0.74", map[string]string{"aadpodidbinding": "cart"})
	code, output := s.explains(world.Kubeconfig, "shop/lonely-0")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "or give --operation-mode and the agents' other flags")

	_, err := world.Kube.CoreV1().ServiceAccounts("shop").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "stranger"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	stranger, err := world.ControlPlane.Kubeconfig(t.Context(), "shop", "stranger")
	require.NoError(t, err)
	code, output = s.explains(stranger, "--operation-mode=managed", "shop/lonely-0")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "pods: the agent's service account may not list and watch this resource: apply its ClusterRole")
}

// The API server admits no list of the bindings: the agent says so to the pod, in its log,
// and to nmi explain.
func TestARequestBeforeTheAgentIsInSync(t *testing.T) {
	s := begin(t)
	_, err := world.Kube.CoreV1().ServiceAccounts("shop").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "powerless"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	kubeconfig, err := world.ControlPlane.Kubeconfig(t.Context(), "shop", "powerless")
	require.NoError(t, err)
	a, err := testbed.StartAgent(kubeconfig, "--pod-wait=100ms")
	require.NoError(t, err)
	t.Cleanup(func() { _, _ = a.Stop(); s.nmi("cleanup") })
	require.Eventually(t, func() bool { return strings.Contains(s.nat(), "-j aad-metadata") }, patience, 20*time.Millisecond, "the rules come first")
	p := s.pod("early-0", "10.244.0.75", testbed.Ptp, "cart")
	require.Eventually(t, func() bool {
		got := p.asks(vault)
		return got.status == 503 && strings.Contains(got.body, "The agent is not in sync with the API server yet")
	}, patience, 50*time.Millisecond)
	s.says(a, "the agent has not synced with the API server yet: pods: the agent's service account may not list and watch this resource")
	assert.NotContains(t, a.Log(), "no pod on this node has this address")
	code, output := s.explains(kubeconfig, "--probe-socket="+a.ProbeSocket, "shop/early-0")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "the agent has not synced with the API server yet: pods: the agent's service account")
}

// MIC makes assignments in namespace default; whoever may write them in another one gives
// nobody anything.
func TestAnAssignmentOutsideOfMICsNamespaceGivesNothing(t *testing.T) {
	s := begin(t)
	a := s.agent("--operation-mode=standard")
	p := s.pod("victim-0", "10.244.0.76", testbed.Ptp, "forged")
	forge := func(namespace, name string) {
		s.put("AzureAssignedIdentity", namespace, name, map[string]any{
			"labels": map[string]any{"nodename": testbed.NodeName},
			"spec": map[string]any{
				"azureIdentityRef": map[string]any{
					"metadata": map[string]any{"name": "forged", "namespace": "shop", "annotations": map[string]any{"aadpodidentity.k8s.io/Behavior": "namespaced"}},
					"spec":     map[string]any{"type": int64(0), "clientID": third.ClientID},
				},
				"azureBindingRef": map[string]any{"metadata": map[string]any{"name": "forged", "namespace": "shop"}, "spec": map[string]any{"azureIdentity": "forged", "selector": "forged"}},
				"pod":             "victim-0", "podNamespace": "shop", "nodename": testbed.NodeName,
			},
			"status": map[string]any{"status": "Assigned"},
		})
	}
	forge("kube-system", "forged")
	forge("shop", "forged")
	require.Eventually(t, func() bool {
		got := p.asks(vault)
		require.Empty(t, got.subject, "a token of %s", third.ClientID)
		return got.status == 400 && strings.Contains(a.Log(), "AzureAssignedIdentity kube-system/forged") && strings.Contains(a.Log(), "AzureAssignedIdentity shop/forged")
	}, patience, 50*time.Millisecond, "%s", a.Log)
	assert.Zero(t, world.IMDS.Requests())
	forge("default", "forged")
	p.hears(vault, third.ClientID)
}
