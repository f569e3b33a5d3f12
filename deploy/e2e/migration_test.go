//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// TestReplacingTheOldNMILeaks is why docs/migrating.md does not just replace it: with one
// pod on a node at a time, as when its image is swapped, nothing protects pods from its
// SIGTERM until the agent's fences. The other tests of this file count the same way.
func TestReplacingTheOldNMILeaks(t *testing.T) {
	s := begin(t)
	old := s.oldNMI(cart)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	asking := startAskers(t, p, cart)
	asking.areServed(t)
	require.Zero(t, asking.node.Load(), "as long as it runs")
	start := time.Now()
	old.terminate()
	old.running.Wait()
	s.agent()
	took := time.Since(start)
	asking.areServed(t)
	asking.end()
	t.Logf("tokens of the node in pods: %d in %s; requests past the agents: %d", asking.node.Load(), took.Round(100*time.Millisecond), len(world.Leaks()))
	assert.Positive(t, asking.node.Load())
	assert.NotEmpty(t, world.Leaks())
	world.IMDS.Reset() // these were leaks, and meant to be
}

// TestMigration follows docs/migrating.md, whose commands it runs, with a pod that asks for
// tokens all the time. Not one may be the node's.
func TestMigration(t *testing.T) {
	standard := func(s *scenario) *pod {
		s.identity("shop", "standard", cart)
		s.binding("shop", "standard", "standard", "standard")
		s.assignment("standard", "moving-0", "Assigned", cart)
		return s.pod("moving-0", "10.244.0.11", testbed.Routed, "standard")
	}
	t.Run("managed mode", func(t *testing.T) {
		migrate(t, migration{oldNamespace: "kube-system", namespace: "kube-system", newPod: func(s *scenario) *pod {
			s.binding("shop", "moving", "cart", "moving")
			return s.pod("moving-0", "10.244.0.11", testbed.Ptp, "moving")
		}})
	})
	t.Run("standard mode", func(t *testing.T) {
		migrate(t, migration{oldNamespace: "default", namespace: "default", newPod: standard})
	})
	t.Run("standard mode with Helm", func(t *testing.T) {
		migrate(t, migration{oldNamespace: "default", namespace: "identity", helm: true, newPod: standard})
	})
}

// migration is one of the ways of docs/migrating.md.
type migration struct {
	oldNamespace, namespace string // of the old DaemonSet, and of the agent's
	helm                    bool   // instead of kubectl
	newPod                  func(*scenario) *pod
}

func migrate(t *testing.T, m migration) {
	t.Helper()
	s := begin(t)
	k := newKubectl(t, m.namespace)
	p := m.newPod(s)
	standard := m.oldNamespace == "default"
	var mic *pod
	if standard { // MIC keeps running, and asks IMDS as the node
		mic = s.network("10.244.0.12", testbed.Ptp)
		s.object("default", "mic-5d9f8c7b6-abcde", "10.244.0.12", map[string]string{"component": "mic", "k8s-app": "aad-pod-id"})
	}
	old := s.oldNMI(cart)
	k.apply(t, oldDaemonSet(m.oldNamespace))
	asking := startAskers(t, p, cart)
	asking.areServed(t)

	command := 0 // of the section: kubectl's, then Helm's
	if m.helm {
		k.useHelm(t)
		require.NoError(t, os.WriteFile(filepath.Join(k.dir, "nmi-values.yaml"), []byte(k.block(t, "Prepare", "yaml", 0)), 0o600))
		k.run(t, "With Helm", 0)
		command = 1
	} else {
		if standard {
			k.replaced = append(k.replaced, "manifests=deploy/manifests ", "manifests=deploy/manifests/standard ")
		}
		k.run(t, "Prepare", 0)
	}
	k.run(t, "Start the agent beside the old NMI", command)
	kubeconfig := k.agentKubeconfig(t)
	beside := s.agentOf(kubeconfig, k.args(t)...)
	require.NoError(t, beside.AwaitReady(t.Context()))
	s.says(beside, "iptables rules put in place")
	time.Sleep(4 * oldNMIInterval) // in which both write the redirect, again and again
	asking.areServed(t)
	if m.namespace != m.oldNamespace {
		k.replaced = append(k.replaced, "<namespace>", m.oldNamespace, "<name>", "nmi", "--cascade=foreground", "") // nothing collects garbage here
		k.run(t, "Remove the old NMI", 0)
	}
	old.terminate() // as Kubernetes does now
	asking.areServed(t)

	k.run(t, "Move the agent to its own port", command)
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + kubeconfig}, append(k.args(t), "--node="+testbed.NodeName, "--handover-dir="+testbed.HandoverDir(world.Kubeconfig))...)
	require.NoError(t, err)
	assert.Equal(t, 1, code, "too early: the kubelet starts it again")
	assert.Contains(t, output, "port 2579 is taken")
	asking.areServed(t)
	old.running.Wait()
	final := s.agentOf(kubeconfig, k.args(t)...)
	s.says(final, "listening")
	require.NoError(t, final.AwaitReady(t.Context()))
	s.stops(beside)
	asking.areServed(t)
	assert.Contains(t, s.nat(), "2579")
	assert.NotContains(t, s.nat(), "2580")
	if standard {
		assert.Equal(t, imdstest.Node, mic.asks(vault).subject, "MIC is excepted")
	}
	t.Logf("moved: %d tokens, %d of the node, %d requests without an answer; %d requests past the agents",
		asking.own.Load(), asking.node.Load(), asking.refused.Load(), len(world.Leaks()))
	assert.Zero(t, asking.node.Load(), "tokens of the node in pods")
	assert.Empty(t, world.Leaks())

	// And back: the rules that stay do not hinder the old NMI, and protect its pods.
	s.stops(final)
	back := s.oldNMI(cart)
	asking.areServed(t)
	back.terminate()
	back.running.Wait()
	assert.Zero(t, p.probes().status, "refused, although the old NMI has removed its rules")
	require.NoError(t, s.agentOf(kubeconfig, k.args(t)...).AwaitReady(t.Context()))
	asking.areServed(t)
	asking.end()
	t.Logf("back and forth: %d tokens, %d of the node, %d requests without an answer; %d requests past the agents",
		asking.own.Load(), asking.node.Load(), asking.refused.Load(), len(world.Leaks()))
	assert.Zero(t, asking.node.Load(), "tokens of the node in pods")
	assert.Zero(t, asking.foreign.Load())
}

// TestGoingBackInTheMiddle goes back while the agent has not replaced the old NMI on every
// node. There the old NMI must not be stopped: nothing would keep its pods from IMDS. The
// DaemonSet's controller leaves a pod alone whose template comes back as it was.
func TestGoingBackInTheMiddle(t *testing.T) {
	begin(t)
	k := newKubectl(t, "kube-system")
	k.replaced = append(k.replaced, "<the manifest of aad-pod-identity>", "old.yaml")
	k.apply(t, oldDaemonSet("kube-system"))
	before := k.daemonSet(t)
	k.run(t, "Prepare", 0)
	for _, step := range []string{"Start the agent beside the old NMI", "Move the agent to its own port"} {
		k.run(t, step, 0)
		assert.NotEqual(t, before.Spec.Template, k.daemonSet(t).Spec.Template)
		k.run(t, "Going back", 0)
		assert.Equal(t, before.UID, k.daemonSet(t).UID, "not deleted, and its pods with it")
		assert.Equal(t, before.Spec, k.daemonSet(t).Spec)
	}
}

// oldDaemonSet is that of aad-pod-identity's deploy/infra manifests, in short: what
// applying another over it has to cope with.
func oldDaemonSet(namespace string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: nmi, namespace: %s, labels: {component: nmi, tier: node, k8s-app: aad-pod-id}}
spec:
  updateStrategy: {type: RollingUpdate}
  selector: {matchLabels: {component: nmi, tier: node}}
  template:
    metadata: {labels: {component: nmi, tier: node}}
    spec:
      serviceAccountName: aad-pod-id-nmi-service-account
      hostNetwork: true
      volumes:
      - {name: iptableslock, hostPath: {path: /run/xtables.lock, type: FileOrCreate}}
      - {name: kubelet-config, hostPath: {path: /etc/default/kubelet}}
      containers:
      - name: nmi
        image: mcr.microsoft.com/oss/azure/aad-pod-identity/nmi:v1.8.17
        args: [--node=$(NODE_NAME), --http-probe-port=8085]
        env:
        - {name: HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        securityContext: {runAsUser: 0, capabilities: {drop: [ALL], add: [DAC_READ_SEARCH, NET_ADMIN, NET_RAW]}}
        volumeMounts:
        - {name: iptableslock, mountPath: /run/xtables.lock}
        - {name: kubelet-config, mountPath: /etc/default/kubelet, readOnly: true}
        livenessProbe: {httpGet: {path: /healthz, port: 8085}, initialDelaySeconds: 10, periodSeconds: 5}
`, namespace)
}
