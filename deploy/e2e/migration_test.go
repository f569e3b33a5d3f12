//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

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
	t.Run("managed mode", func(t *testing.T) {
		migrate(t, "kube-system", "", func(s *scenario) *pod {
			s.binding("shop", "moving", "cart", "moving")
			return s.pod("moving-0", "10.244.0.11", testbed.Ptp, "moving")
		})
	})
	t.Run("standard mode", func(t *testing.T) {
		migrate(t, "default", "s/--operation-mode=managed/--operation-mode=standard\\n        - --MICNamespace=default/", func(s *scenario) *pod {
			s.identity("shop", "standard", cart)
			s.binding("shop", "standard", "standard", "standard")
			s.assignment("standard", "moving-0", "Assigned", cart)
			return s.pod("moving-0", "10.244.0.11", testbed.Routed, "standard")
		})
	})
}

// migrate moves a node whose old NMI is in a namespace; edit is what sed does to nmi.yaml.
func migrate(t *testing.T, namespace, edit string, newPod func(*scenario) *pod) {
	t.Helper()
	s := begin(t)
	k := newKubectl(t)
	p := newPod(s)
	standard := namespace != "kube-system"
	var mic *pod
	if standard {
		mic, _ = s.micLookalike("10.244.0.12") // MIC keeps running, and asks IMDS as the node
	}
	old := s.oldNMI(cart)
	k.apply(t, oldDaemonSet(namespace))
	asking := startAskers(t, p, cart)
	asking.areServed(t)

	k.run(t, "Prepare")
	if edit != "" {
		k.sh(t, "sed -i '"+edit+"' nmi.yaml")
	}
	k.run(t, "Start the agent beside the old NMI")
	beside := s.agent(k.args(t)...)
	s.says(beside, "iptables rules put in place")
	time.Sleep(4 * oldNMIInterval) // in which both write the redirect, again and again
	asking.areServed(t)
	if standard {
		k.run(t, "Remove the old NMI")
	}
	old.terminate() // as Kubernetes does now
	asking.areServed(t)

	k.run(t, "Move the agent to its own port")
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig}, append(k.args(t), "--node="+testbed.NodeName, "--handover-dir="+testbed.HandoverDir(world.Kubeconfig))...)
	require.NoError(t, err)
	assert.Equal(t, 1, code, "too early: the kubelet starts it again")
	assert.Contains(t, output, "port 2579 is taken")
	asking.areServed(t)
	old.running.Wait()
	final := s.successor(k.args(t)...)
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
	s.agent(k.args(t)...)
	asking.areServed(t)
	asking.end()
	t.Logf("back and forth: %d tokens, %d of the node, %d requests without an answer; %d requests past the agents",
		asking.own.Load(), asking.node.Load(), asking.refused.Load(), len(world.Leaks()))
	assert.Zero(t, asking.node.Load(), "tokens of the node in pods")
	assert.Zero(t, asking.foreign.Load())
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

// kubectl runs commands of docs/migrating.md as the cluster's administrator, in a directory
// that deploy is in.
type kubectl struct{ dir, doc, path string }

func newKubectl(t *testing.T) *kubectl {
	t.Helper()
	root, err := testbed.Root()
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(root, ".cache", "bin", "kubectl"), "run make kube")
	doc, err := os.ReadFile(filepath.Join(root, "docs", "migrating.md"))
	require.NoError(t, err)
	k := &kubectl{dir: t.TempDir(), doc: string(doc), path: filepath.Join(root, ".cache", "bin") + ":" + os.Getenv("PATH")}
	require.NoError(t, os.Symlink(filepath.Join(root, "deploy"), filepath.Join(k.dir, "deploy")))
	config, admin := clientcmdapi.NewConfig(), world.Admin()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: admin.Host, InsecureSkipTLSVerify: true}
	config.AuthInfos["admin"] = &clientcmdapi.AuthInfo{Token: admin.BearerToken}
	config.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "admin"}
	config.CurrentContext = "c"
	require.NoError(t, clientcmd.WriteToFile(*config, filepath.Join(k.dir, "kubeconfig")))
	t.Cleanup(func() {
		for _, namespace := range []string{"kube-system", "default"} {
			k.sh(t, "kubectl -n "+namespace+" delete daemonset nmi --ignore-not-found")
		}
		k.sh(t, "kubectl apply --server-side --force-conflicts -f deploy/manifests/daemonset.yaml") // as it was
	})
	return k
}

func (k *kubectl) sh(t *testing.T, script string) {
	t.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = k.dir
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(k.dir, "kubeconfig"), "HOME="+k.dir, "PATH="+k.path)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s\n%s", script, out)
}

func (k *kubectl) apply(t *testing.T, manifest string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(k.dir, "old.yaml"), []byte(manifest), 0o600))
	k.sh(t, "kubectl -n kube-system delete daemonset nmi; kubectl apply -f old.yaml")
}

// run runs the first commands below a heading, but for those that wait for controllers.
func (k *kubectl) run(t *testing.T, heading string) {
	t.Helper()
	_, section, found := strings.Cut(k.doc, heading+"\n")
	require.True(t, found, heading)
	_, section, found = strings.Cut(section, "```\n")
	require.True(t, found, heading)
	script, _, _ := strings.Cut(section, "```\n")
	lines := slices.DeleteFunc(slices.Collect(strings.Lines(script)), func(line string) bool {
		return strings.Contains(line, " rollout status ") || strings.Contains(line, " wait ")
	})
	k.sh(t, strings.Join(lines, ""))
}

// args are those of the DaemonSet that is in the cluster now, but for what the testbed
// gives to each agent.
func (k *kubectl) args(t *testing.T) []string {
	t.Helper()
	ds, err := world.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	spec := ds.Spec.Template.Spec
	require.Len(t, spec.Containers, 1)
	assert.Equal(t, "nmi", spec.ServiceAccountName)
	assert.Equal(t, 1, ds.Spec.UpdateStrategy.RollingUpdate.MaxSurge.IntValue(), "beside the old one")
	assert.Empty(t, spec.Containers[0].Ports, "two pods cannot have one host port")
	return slices.DeleteFunc(slices.Clone(spec.Containers[0].Args), func(arg string) bool {
		return strings.HasPrefix(arg, "--node=") || strings.HasPrefix(arg, "--probe-socket=")
	})
}
