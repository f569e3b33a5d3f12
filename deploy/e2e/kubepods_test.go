//go:build e2e

package e2e

import (
	"context"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

// kubepods is where the agents and the pods of a scenario in mode ebpf are.
type kubepods struct {
	*scenario
	*testbed.Kubepods

	// Of agents that start from now on.
	env   []string // what differs in their environment
	rules bool     // they have what the manifest for rules gives them
}

func (s *scenario) kubepods() *kubepods {
	s.t.Helper()
	made, err := testbed.NewKubepods()
	require.NoError(s.t, err)
	k := &kubepods{scenario: s, Kubepods: made}
	s.t.Cleanup(func() { assert.NoError(s.t, made.Close()) })
	s.t.Cleanup(k.cleanup)
	return k
}

// cleanup runs nmi cleanup where the agents' programs are pinned.
func (k *kubepods) cleanup() {
	k.t.Helper()
	assert.NoError(k.t, k.Cleanup("--handover-dir="+testbed.HandoverDir(world.Kubeconfig)))
}

// launcher is a command that starts the one after it as an agent of a new pod.
func (k *kubepods) launcher() []string {
	k.t.Helper()
	launcher, err := k.Agent(k.rules)
	require.NoError(k.t, err)
	return slices.Concat([]string{"env"}, k.env, launcher)
}

// starts starts an agent in a pod of its own, with the manifest's capabilities, and does not wait for it.
func (k *kubepods) starts(flags ...string) *testbed.Agent {
	k.t.Helper()
	binary, err := testbed.AgentBinary()
	require.NoError(k.t, err)
	a, err := testbed.StartAgentIn(k.launcher(), binary, world.Kubeconfig, append([]string{"--redirect-mode=ebpf", "--cgroup-root=" + k.CgroupRoot}, flags...)...)
	require.NoError(k.t, err)
	k.t.Cleanup(func() {
		_ = a.Kill()
		if k.t.Failed() {
			k.t.Log("the agent's log:\n" + a.Log())
		}
	})
	return a
}

func (k *kubepods) agent(flags ...string) *testbed.Agent {
	k.t.Helper()
	a := k.starts(flags...)
	require.NoError(k.t, a.AwaitReady(k.t.Context()))
	return a
}

// container is where processes of a pod run.
type container struct {
	*testbed.Container
	t *testing.T
}

// pod makes a pod's object and a container of it; without a network it is on the host network.
func (k *kubepods) pod(name, addr string, network *pod, labels map[string]string) *container {
	k.t.Helper()
	if network != nil {
		k.object("shop", name, addr, labels)
	} else {
		k.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: corev1.PodSpec{HostNetwork: true}})
	}
	return k.containerOf("shop", name, network)
}

// create makes a pod's object in namespace shop until the test ends.
func (k *kubepods) create(p *corev1.Pod) {
	k.t.Helper()
	p.Spec.NodeName, p.Spec.Containers = testbed.NodeName, []corev1.Container{{Name: "app", Image: "example/app"}}
	_, err := world.Kube.CoreV1().Pods("shop").Create(k.t.Context(), p, metav1.CreateOptions{})
	require.NoError(k.t, err)
	k.t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", p.Name) })
}

// containerOf is container for the pod of an object.
func (k *kubepods) containerOf(namespace, name string, network *pod) *container {
	k.t.Helper()
	return k.container(k.uid(namespace, name), network)
}

func (k *kubepods) uid(namespace, name string) string {
	k.t.Helper()
	object, err := world.Kube.CoreV1().Pods(namespace).Get(k.t.Context(), name, metav1.GetOptions{})
	require.NoError(k.t, err)
	return string(object.UID)
}

// container makes a container in a pod's cgroup, and in the network namespace of one.
func (k *kubepods) container(uid string, network *pod) *container {
	k.t.Helper()
	var ns *testbed.Namespace
	if network != nil {
		ns = network.Namespace
	}
	c, err := k.NewContainer(uid, ns)
	require.NoError(k.t, err)
	k.t.Cleanup(func() { assert.NoError(k.t, c.Close()) })
	return &container{c, k.t}
}

// asks sends one request for a vault token, over a new connection.
func (c *container) asks() answer { return c.get(tokenURL + vault) }

func (c *container) get(url string) answer {
	client := c.Client(patience)
	defer client.CloseIdleConnections()
	return ask(c.t, client, url)
}
