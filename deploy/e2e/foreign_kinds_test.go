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

	"github.com/podidentity/nmi/deploy/testbed"
)

// TestForeignKinds has the API server check the chart's objects and samples of kinds that others
// define, by their own definitions. Nothing acts on them here: there is no Cilium, no Prometheus
// operator and no OpenShift.
func TestForeignKinds(t *testing.T) {
	root, err := testbed.Root()
	require.NoError(t, err)
	definitions := filepath.Join(root, ".cache", "definitions")
	require.DirExists(t, definitions, "run make definitions")
	c, err := world.AddCluster(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	h := newHelm(t, c)
	kubectl := func(input string, args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(root, ".cache", "bin", "kubectl"), append(args, "--kubeconfig="+h.kubeconfig)...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	out, err := kubectl("", "apply", "--server-side", "-f", definitions)
	require.NoError(t, err, out)
	out, err = kubectl("", "wait", "--for=condition=Established", "--timeout=30s", "-f", definitions)
	require.NoError(t, err, out)

	objects := h.succeeds(t, "template", "nmi", chartForTestbed(t), "--kube-version=1.37",
		"--set=serviceMonitor.enabled=true,prometheusRule.enabled=true,grafanaDashboard.enabled=true,openshift.securityContextConstraints=true,nmi.redirectMode=none,cilium.localRedirectPolicy=true,serviceMonitor.labels.release=prometheus")
	for _, sample := range []string{"cilium/local-redirect-policy.yaml", "network-policies/ciliumnetworkpolicy.yaml", "network-policies/networkpolicy.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", sample))
		require.NoError(t, err)
		objects += "\n---\n" + string(text)
	}
	validate := []string{"apply", "--dry-run=server", "--validate=strict", "--filename=-"}
	out, err = kubectl(objects, validate...)
	require.NoError(t, err, out)
	for _, object := range []string{
		"servicemonitor.monitoring.coreos.com/nmi", "prometheusrule.monitoring.coreos.com/nmi", "configmap/nmi-dashboard",
		"securitycontextconstraints.security.openshift.io/nmi",
		"ciliumlocalredirectpolicy.cilium.io/nmi", "ciliumnetworkpolicy.cilium.io/nmi", "networkpolicy.networking.k8s.io/nmi",
	} {
		assert.Contains(t, out, object+" created (server dry run)")
	}

	for right, wrong := range map[string]string{
		"interval: 30s":                 "interval: often",
		"allowHostNetwork: true":        "allowHostNet: true",
		"localEndpointSelector:":        "endpointSelector:",
		"enableDefaultDeny: {egress: f": "enableDefaultDeny: {egres: f",
	} {
		require.Contains(t, objects, right)
		out, err = kubectl(strings.ReplaceAll(objects, right, wrong), validate...)
		require.Error(t, err, "%s was accepted: %s", wrong, out)
	}
}
