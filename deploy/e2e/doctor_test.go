//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/podidentity/nmi/deploy/testbed"
)

// How nmi doctor is run.
var (
	// In a container of the manifest root has two capabilities.
	asAgent = []string{"setpriv", "--bounding-set=-all,+net_admin,+net_raw"}
	// Root with all capabilities, over whom the node's network does not say so: EPERM for each
	// rule, as where an LSM program refuses them.
	forbidden = []string{"unshare", "--user", "--map-root-user"}
)

// diagnosis is the JSON of nmi doctor.
type diagnosis struct {
	Success    bool `json:"success"`
	Categories []struct {
		Name   string    `json:"name"`
		Checks []finding `json:"checks"`
	} `json:"categories"`
}

type finding struct {
	Description string `json:"description"`
	Result      string `json:"result"`
	Hint        string `json:"hint"`
	Error       string `json:"error"`
}

// about returns the findings that have an anchor of docs/doctor.md.
func (d diagnosis) about(anchor string) (found []finding) {
	for _, category := range d.Categories {
		for _, check := range category.Checks {
			if check.Hint == "docs/doctor.md#"+anchor {
				found = append(found, check)
			}
		}
	}
	return found
}

// anchors lists those of the checks that had a result.
func (d diagnosis) anchors(result string) (all []string) {
	for _, category := range d.Categories {
		for _, check := range category.Checks {
			if check.Result == result {
				all = append(all, strings.TrimPrefix(check.Hint, "docs/doctor.md#"))
			}
		}
	}
	return all
}

// examine runs nmi doctor with this kubeconfig and returns what it prints. The machine's
// cgroups are hidden: they are not the test's to ask about.
func (s *scenario) examine(kubeconfig string, launcher []string, args ...string) (code int, stdout, stderr string) {
	s.t.Helper()
	binary, err := testbed.AgentBinary()
	require.NoError(s.t, err)
	command := append([]string{"--mount", "--propagation=private", "sh", "-c", `mount -t tmpfs none /sys/fs/cgroup && exec "$@"`, "sh"}, launcher...)
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", append(append(command, binary, "doctor"), args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	var out, errors bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errors
	_ = cmd.Run() // the code says it
	return cmd.ProcessState.ExitCode(), out.String(), errors.String()
}

// diagnose is examine, decoded.
func (s *scenario) diagnose(kubeconfig string, launcher []string, args ...string) diagnosis {
	s.t.Helper()
	code, stdout, stderr := s.examine(kubeconfig, launcher, append(args, "-o", "json")...)
	decoder := json.NewDecoder(strings.NewReader(stdout))
	decoder.DisallowUnknownFields()
	var d diagnosis
	require.NoError(s.t, decoder.Decode(&d), "%s%s", stdout, stderr)
	assert.Equal(s.t, d.Success, code == 0, "exit code %d: %s", code, stderr)
	failed := d.anchors("error")
	assert.Equal(s.t, d.Success, len(failed) == 0)
	if len(failed) > 0 {
		assert.Equal(s.t, fmt.Sprintf("nmi: checks failed: %d\n", len(failed)), stderr)
	}
	return d
}

// finds requires a result of the checks of an anchor, one at least, with words in its error.
func (s *scenario) finds(d diagnosis, anchor, result, words string) {
	s.t.Helper()
	assert.True(s.t, slices.ContainsFunc(d.about(anchor), func(f finding) bool {
		return f.Result == result && strings.Contains(f.Error, words)
	}), "want %s of %s, %q; found %+v", result, anchor, words, d.about(anchor))
}

func TestDoctorInAnAgentsPod(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	s.pod("doctor-0", "10.244.0.81", testbed.Ptp, "cart")
	a := s.agent()
	socket := "--probe-socket=" + a.ProbeSocket
	d := s.diagnose(world.Kubeconfig, asAgent, socket)
	assert.Empty(t, d.anchors("error"), "%+v", d)
	assert.Empty(t, d.anchors("warning"), "%+v", d)
	assert.Equal(t, []string{"imds-restriction", "connect4", "ebpf-host-routing", "iptables-monitor", "startup-taint"}, d.anchors("skipped"), "what the manifest gives no right to, and what is only to be known: %+v", d)
	assert.Contains(t, d.about("agent")[0].Description, "node node1, managed mode, --redirect-mode=auto", "the agent's flags")
	assert.Len(t, d.about("rights"), 10)
	for _, f := range d.about("ebpf-host-routing") {
		assert.Contains(t, f.Error, "this account may not get nodes")
	}

	code, stdout, stderr := s.examine(world.Kubeconfig, asAgent, socket)
	assert.Zero(t, code, stderr)
	assert.Contains(t, stdout, "agent\n-----\n√ an agent answers on ")
	assert.NotContains(t, stdout, "\x1b[", "no colors in a pipe")
	binary, err := testbed.AgentBinary()
	require.NoError(t, err)
	terminal := s.command("unshare", "--mount", "--propagation=private", "sh", "-c",
		"mount -t tmpfs none /sys/fs/cgroup && exec env KUBECONFIG="+world.Kubeconfig+" script -qec '"+binary+" doctor "+socket+"' /dev/null")
	assert.Contains(t, terminal, "\x1b[32m√\x1b[0m an agent answers on ")
}

func TestDoctorFindsWhatIsWrongWithTheAgent(t *testing.T) {
	s := begin(t)
	a := s.agent()
	socket := "--probe-socket=" + a.ProbeSocket
	_, err := a.Stop()
	require.NoError(t, err)
	s.command("iptables", "-t", "nat", "-F", "aad-metadata")
	s.command("ip", "rule", "del", "pref", "11")
	d := s.diagnose(world.Kubeconfig, asAgent, socket, "--node="+testbed.NodeName)
	s.finds(d, "agent", "error", "no agent listens on")
	s.finds(d, "ready", "skipped", "no agent answers")
	s.finds(d, "redirect", "error", "chain aad-metadata of the table nat has other rules")
	s.finds(d, "routing", "error", "missing policy routing rules: 11: to 169.254.169.254/32 prohibit")
	s.finds(d, "guard", "success", "")

	other, err := net.Listen("tcp4", "0.0.0.0:9090")
	require.NoError(t, err)
	defer other.Close()
	second := s.agentOf(s.account("doctor-powerless", []right{{resource: "pods", verb: "list"}}))
	s.says(second, "iptables rules put in place")
	require.Eventually(t, func() bool {
		d = s.diagnose(world.Kubeconfig, asAgent, "--probe-socket="+second.ProbeSocket)
		return strings.Contains(fmt.Sprint(d.about("ready")), "may not list and watch this resource")
	}, patience, 100*time.Millisecond, "%+v", d)
	s.finds(d, "redirect", "success", "")
	s.finds(d, "routing", "success", "")
	s.finds(d, "ports", "warning", "--prometheus-port")
}

func TestDoctorWaits(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	socket := filepath.Join(t.TempDir(), "probe.sock")
	started := make(chan *testbed.Agent, 1)
	go func() { // after the doctor, which is no condition of the test
		a, err := testbed.StartAgent(world.Kubeconfig, "--probe-socket="+socket)
		if assert.NoError(t, err) {
			started <- a
		}
		close(started)
	}()
	d := s.diagnose(world.Kubeconfig, asAgent, "--probe-socket="+socket, "--wait=1m")
	a := <-started
	require.NotNil(t, a)
	s.endsWell(a)
	assert.True(t, d.Success, "%+v", d)
}

func TestDoctorBeforeAnInstallation(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	s.pod("doctor-pre", "10.244.0.82", testbed.Ptp, "cart")
	s.command("iptables", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY") // as every kubelet does
	t.Cleanup(func() { assert.NoError(t, exec.Command("iptables", "-t", "mangle", "-X", "KUBE-KUBELET-CANARY").Run()) })
	ruleset := func() string {
		return s.command("nft", "--stateless", "list", "ruleset") + s.command("ip", "rule") + s.command("cat", "/proc/net/ip_tables_names")
	}
	before := ruleset()
	d := s.diagnose(world.Kubeconfig, asAgent, "--pre", "--node="+testbed.NodeName, "--http-probe-port=8085")
	assert.True(t, d.Success, "%+v", d)
	assert.Empty(t, d.anchors("warning"), "%+v", d)
	for _, anchor := range []string{"agent", "ready", "redirect", "guard", "routing", "rights", "definitions", "startup-taint"} {
		assert.Empty(t, d.about(anchor), anchor)
	}
	assert.Len(t, d.about("ports"), 3)
	s.finds(d, "writable", "success", "")
	s.finds(d, "interfaces", "success", "")
	assert.Equal(t, before, ruleset(), "nothing is changed")

	d = s.diagnose(world.Kubeconfig, forbidden, "--pre")
	s.finds(d, "privileges", "success", "")
	s.finds(d, "writable", "error", "the node may forbid iptables rules, as AKS nodes with eBPF host routing do")
	s.finds(d, "interfaces", "skipped", "give --node")

	ln, err := net.Listen("tcp4", "0.0.0.0:2579")
	require.NoError(t, err)
	defer ln.Close()
	s.finds(s.diagnose(world.Kubeconfig, asAgent, "--pre"), "ports", "error", "a program of user 0 listens on port 2579")
}

// TestDoctorFindsEachMissingRight takes the rights away one by one: one line fails each time.
func TestDoctorFindsEachMissingRight(t *testing.T) {
	all := append(chartRights(t, "standard.yaml", "ClusterRole", "nmi"), startupTaintRights(t)...)
	for i, missing := range all {
		t.Run("without "+missing.String(), func(t *testing.T) {
			s := begin(t)
			kubeconfig := s.account(fmt.Sprintf("doctor-without-%d", i), slices.Delete(slices.Clone(all), i, i+1))
			d := s.diagnose(kubeconfig, asAgent, "--node="+testbed.NodeName, "--operation-mode=standard", startupTaintFlag)
			rights := d.about("rights")
			assert.Len(t, rights, len(all))
			for _, f := range rights {
				switch {
				case f.Description != "this account may "+missing.String():
					assert.Equal(t, "success", f.Result, "%+v", f)
				case missing.resource == "nodes":
					assert.Equal(t, "warning", f.Result, "%+v", f)
					assert.Contains(t, f.Error, "deploy/admission/startup-taint.yaml")
				case missing.resource == "events":
					assert.Equal(t, "warning", f.Result, "%+v", f)
					assert.Contains(t, f.Error, "apply its ClusterRole (deploy/manifests/standard)")
				default:
					assert.Equal(t, "error", f.Result, "%+v", f)
					assert.Contains(t, f.Error, "apply its ClusterRole (deploy/manifests/standard)")
				}
			}
		})
	}
}

func TestDoctorFindsMissingDefinitions(t *testing.T) {
	s := begin(t)
	for _, tc := range []struct{ resource, mode, result string }{
		{"azurepodidentityexceptions", "managed", "warning"},
		{"azureassignedidentities", "standard", "error"},
		{"azureassignedidentities", "managed", "success"},
	} {
		restore, err := world.RemoveDefinition(t.Context(), tc.resource+".aadpodidentity.k8s.io")
		require.NoError(t, err)
		words := "the API server does not serve " + tc.resource
		if tc.result == "success" {
			words = ""
		}
		var d diagnosis
		assert.Eventually(t, func() bool { // discovery follows
			d = s.diagnose(world.Kubeconfig, asAgent, "--operation-mode="+tc.mode)
			return d.about("definitions")[0].Result == tc.result
		}, patience, 100*time.Millisecond)
		s.finds(d, "definitions", tc.result, words)
		require.NoError(t, restore(t.Context()))
		require.Eventually(t, func() bool {
			return s.diagnose(world.Kubeconfig, asAgent, "--operation-mode=standard").about("definitions")[0].Result == "success"
		}, patience, 100*time.Millisecond)
	}
}

func TestDoctorLooksAtTheNode(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	nodes := world.Kube.CoreV1().Nodes()
	patch := func(text string) {
		_, err := nodes.Patch(t.Context(), testbed.NodeName, "application/merge-patch+json", []byte(text), metav1.PatchOptions{})
		require.NoError(t, err)
	}
	pods := right{resource: "pods", verb: "list"}
	list := s.account("doctor-lists", []right{pods, {resource: "nodes", verb: "list"}}) // as with a startup taint
	get := s.account("doctor-gets", []right{pods, {resource: "nodes", verb: "get"}, {group: "cilium.io", resource: "ciliumnodes", verb: "get"}})
	node := "--node=" + testbed.NodeName
	d := s.diagnose(get, asAgent, node)
	for _, anchor := range []string{"ebpf-host-routing", "iptables-monitor", "startup-taint"} {
		s.finds(d, anchor, "success", "")
	}
	s.finds(s.diagnose(list, asAgent, node), "startup-taint", "success", "")

	patch(`{"metadata":{"labels":{"kubernetes.azure.com/ebpf-host-routing":"true"}},"spec":{"taints":[{"key":"` + startupTaint.Key + `","value":"true","effect":"NoSchedule"}]}}`)
	for _, kubeconfig := range []string{get, list} {
		d = s.diagnose(kubeconfig, asAgent, node)
		s.finds(d, "ebpf-host-routing", "error", "Use --redirect-mode=ebpf")
		s.finds(d, "startup-taint", "warning", `this agent does not remove it: --startup-taint is ""`)
	}
	d = s.diagnose(get, asAgent, node, "--redirect-mode=none", startupTaintFlag)
	s.finds(d, "ebpf-host-routing", "success", "")
	s.finds(d, "startup-taint", "warning", startupTaint.ToString()+" is still on the node")

	s.ciliumNode(map[string]any{"kubernetes.azure.com/user-iptables-rules": "true"})
	s.finds(s.diagnose(get, asAgent, node), "iptables-monitor", "warning", "kubernetes.azure.com/user-iptables-rules=true")
	s.finds(s.diagnose(list, asAgent, node), "iptables-monitor", "skipped", "this account may not get ciliumnodes")

	p := "doctor-federated"
	_, err := world.Kube.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p, Labels: map[string]string{"aadpodidbinding": "cart"}},
		Spec: corev1.PodSpec{NodeName: testbed.NodeName, Containers: []corev1.Container{{
			Name: "app", Image: "example/app", Env: []corev1.EnvVar{{Name: "AZURE_FEDERATED_TOKEN_FILE", Value: "/token"}},
		}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", p) })
	s.finds(s.diagnose(get, asAgent, node), "workload-identity", "warning", "shop/"+p)
}

// ciliumNode makes the node's CiliumNode, and the definition of such, until the test ends.
func (s *scenario) ciliumNode(labels map[string]any) {
	s.t.Helper()
	definitions := schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	definition := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": "ciliumnodes.cilium.io"},
		"spec": map[string]any{
			"group": "cilium.io", "scope": "Cluster", "names": map[string]any{"plural": "ciliumnodes", "kind": "CiliumNode"},
			"versions": []any{map[string]any{
				"name": "v2", "served": true, "storage": true,
				"schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object"}},
			}},
		},
	}}
	_, err := world.Custom.Resource(definitions).Create(s.t.Context(), definition, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		assert.NoError(s.t, world.Custom.Resource(definitions).Delete(context.Background(), "ciliumnodes.cilium.io", metav1.DeleteOptions{}))
	})
	node := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": map[string]any{"name": testbed.NodeName, "labels": labels},
	}}
	require.Eventually(s.t, func() bool {
		_, err := world.Custom.Resource(schema.GroupVersionResource{Group: "cilium.io", Version: "v2", Resource: "ciliumnodes"}).
			Create(context.Background(), node, metav1.CreateOptions{})
		return err == nil
	}, patience, 50*time.Millisecond)
}
