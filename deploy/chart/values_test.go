package chart

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

// assertStrings checks the fields of Kubernetes objects that are strings.
func assertStrings(t *testing.T, value any) {
	t.Helper()
	switch value := value.(type) {
	case map[string]any:
		for key, field := range value {
			switch key {
			case "name", "namespace", "serviceAccountName", "priorityClassName", "azureIdentity", "value", "interval", "image":
				assert.IsType(t, "", field, key)
			case "labels", "annotations", "matchLabels", "podLabels", "nodeSelector", "data":
				fields, ok := field.(map[string]any)
				require.True(t, ok, key)
				for name, text := range fields {
					assert.IsType(t, "", text, "%s.%s", key, name)
				}
			case "args", "users", "resourceNames":
				for _, text := range field.([]any) { //nolint:forcetypeassert // else it panics, and the test fails
					assert.IsType(t, "", text, key)
				}
			default:
				assertStrings(t, field)
			}
		}
	case []any:
		for _, element := range value {
			assertStrings(t, element)
		}
	}
}

// TestRefusedValues is about mistakes, and values of the old chart that would do nothing.
func TestRefusedValues(t *testing.T) {
	for set, text := range map[string]string{
		"nmi.redirectmode=dnat":            "additional properties 'redirectmode' not allowed",
		"nmi.redirectMode=magic":           "at '/nmi/redirectMode': value must be one of 'iptables', 'auto', 'redirect', 'dnat', 'ebpf', 'none'",
		"operationMode=Managed":            "at '/operationMode': value must be one of 'managed', 'standard'",
		"nmi.probePort=http":               "at '/nmi/probePort': 'http' does not match pattern",
		"nmi.probePort=70000":              "at '/nmi/probePort': maximum: got 70,000, want 65,535",
		"nmi.digest=sha256:1234":           "at '/nmi/digest': 'sha256:1234' does not match pattern",
		"nmi.tag=v1\t#":                    "at '/nmi/tag': 'v1\\t#' does not match pattern", // would comment out the digest
		"nmi.image=nmi\n":                  "at '/nmi/image'",
		"image.repository=a\n---\nb":       "at '/image/repository'",
		"nmi.resources.memory=1Gi":         "at '/nmi/resources': additional properties 'memory' not allowed",
		"nmi.podLabels.component=x":        "at '/nmi/podLabels/component': value must be 'nmi'",
		"nmi.extraArgs={block-wireserver}": "at '/nmi/extraArgs/0': 'block-wireserver' does not match pattern '^-'",
		"nmi.hostTokenUIDs={root}":         "at '/nmi/hostTokenUIDs/0': got string, want integer",
		"imagePullSecrets={registry}":      "at '/imagePullSecrets/0': got string, want object",
		"image.repository=mcr.microsoft.com/oss/azure/aad-pod-identity": "image.repository: mcr.microsoft.com/oss/azure/aad-pod-identity has images of aad-pod-identity, and not of this agent",
		"bootGuard=/etc/systemd/system":                                 "at '/bootGuard': got string, want boolean",
		"forceNamespaced=yes":                                           "at '/forceNamespaced': value must be one of true, false, 'true', 'false'",
		"azureIdentities.a.clientID=a":                                  "at '/azureIdentities/a': missing property 'type'",
		"rbac.secrets.shop=credentials":                                 "at '/rbac/secrets/shop': got string, want array",
		`nmi.podLabels.app\.kubernetes\.io/name=x`:                      "nmi.podLabels: the chart gives app.kubernetes.io/name itself",
		"federation.rights=all":                                         "at '/federation/rights': value must be one of '', 'node', 'namespaces', 'cluster'",
		"federation.rights=namespaces":                                  "federation.rights=namespaces needs federation.namespaces",
		"federation.namespaces={shop}":                                  "federation.namespaces counts with federation.rights=namespaces only",
		"federation.audience=a'b":                                       "at '/federation/audience'",
		"federation.tenantID=a/b":                                       "at '/federation/tenantID'",
		"federation.authority=login.example":                            "at '/federation/authority'",
		"federation.tokenProxy=http://proxy.example":                    "at '/federation/tokenProxy'",
		"federation.tokenProxy=https://proxy.example":                   "Set federation.audience=api://AKSIdentityBinding",
		"federation.tokenProxyCA=file.pem":                              "at '/federation/tokenProxyCA'",
		"federation.tokenProxySNI=proxy.example":                        "are of no use without federation.tokenProxy",
		"mic.image=mic":                                                 "mic: this chart does not install MIC",
		"adminsecret.cloud=a":                                           "adminsecret: it is MIC's",
		"rbac.allowAccessToSecrets=true":                                "Name those of service principals in rbac.secrets",
		"rbac.pspEnabled=true":                                          "Kubernetes has no PodSecurityPolicies",
		"cilium.localRedirectPolicy=true":                               "cilium.localRedirectPolicy needs nmi.redirectMode=none",
		"nmi.hostNetworkPods=bound":                                     "nmi.hostNetworkPods=bound needs nmi.redirectMode=ebpf: rules do not see pods on the host network",
		"nmi.updateStrategy.type=Recreate":                              "at '/nmi/updateStrategy/type': value must be one of 'RollingUpdate', 'OnDelete'",
		"serviceMonitor.interval=30":                                    "at '/serviceMonitor/interval'",
		"prometheusRule.severity=a":                                     "at '/prometheusRule': additional properties 'severity' not allowed",
		"startupTaint=nmi":                                              `startupTaint: "nmi" is not a taint that keeps pods off: want <key>[=<value>]:NoSchedule`,
		"startupTaint=nmi:PreferNoSchedule":                             `startupTaint: "nmi:PreferNoSchedule" is not a taint`,
		"startupTaint=a/b/c:NoSchedule":                                 `startupTaint: "a/b/c:NoSchedule" is not a taint`,
		"startupTaint=a='b':NoSchedule":                                 `is not a taint`,
		"startupTaint=true":                                             "at '/startupTaint': got boolean, want string",
		"installCRDs=true":                                              "installCRDs: Helm installs the definitions of this chart where they are missing",
		"podMonitor.enabled=true":                                       "Set serviceMonitor.enabled instead",
		"nmi.extraArgs={--startup-taint=a:NoSchedule}":                  "nmi.extraArgs: --startup-taint has a value of its own in this chart. Set startupTaint instead",
		"nmi.extraArgs={-v=5}":                                          "Set nmi.logVerbosity instead",
		"nmi.extraArgs={-v5}":                                           "Set nmi.logVerbosity instead",
		"nmi.extraArgs={--block-wireserver,--forceNamespaced}":          "Set forceNamespaced instead",
		"nmi.prometheusPort=8085":                                       "nmi.prometheusPort and nmi.probePort are both 8085: choose different ports",
		"nmi.probePort=2579":                                            "nmi.probePort and the agent's own port (--nmi-port) are both 2579",
		"nmi.extraArgs={--nmi-port=9090}":                               "nmi.prometheusPort and --nmi-port in nmi.extraArgs are both 9090",
		"admissionPolicies.allowedIdentities.shop={a b}":                "at '/admissionPolicies/allowedIdentities/shop/0'",
		"podIdentityExceptions.a.namespace=b":                           "at '/podIdentityExceptions/a': missing property 'podLabels'",
	} {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			out, err := render(t, "--set="+set)
			require.Error(t, err)
			assert.Contains(t, out, text)
		})
	}
}

// TestExtraArgs: each flag that the templates write from a value is refused in nmi.extraArgs, and what
// is accepted there is written as it is.
func TestExtraArgs(t *testing.T) {
	for _, values := range []string{"everything", "standard"} {
		text, err := os.ReadFile("testdata/" + values + ".yaml")
		require.NoError(t, err)
		given, err := os.ReadFile("testdata/" + values + ".values.yaml")
		require.NoError(t, err)
		for _, arg := range regexp.MustCompile(`(?m)^        - "?(--([\w-]+)[^"\n]*)"?$`).FindAllStringSubmatch(string(text), -1) {
			if arg[2] == "http-probe-address" || strings.Contains(string(given), arg[1]) {
				continue // has no value in the chart
			}
			t.Run(values+" "+arg[2], func(t *testing.T) {
				t.Parallel()
				out, err := render(t, `--set-json=nmi.extraArgs=["--`+arg[2]+`=x"]`)
				require.Error(t, err)
				assert.Contains(t, out, "nmi.extraArgs: --"+arg[2]+" has a value of its own in this chart")
			})
		}
	}
	text, err := render(t, "--set=nmi.extraArgs={--nmi-port=2580,--vmodule=a=1}")
	require.NoError(t, err, text)
	assert.Contains(t, text, "        - \"--nmi-port=2580\"\n        - \"--vmodule=a=1\"\n")
}

// stringValues has WORD in place of strings that users choose.
const stringValues = `
fullnameOverride: WORD
image: {repository: registry.example}
imagePullSecrets: [{name: WORD}]
operationMode: standard
nmi:
  tag: WORD
  priorityClassName: WORD
  micNamespace: WORD
  podAnnotations: {WORD: WORD}
  podLabels: {WORD: WORD}
  nodeSelector: {WORD: WORD}
  hostTokenUIDs: [4294967294]
azureIdentities:
  WORD: {namespace: WORD, type: 0, clientID: 11111111-2222-3333-4444-555555555555, binding: {name: WORD, selector: WORD}}
podIdentityExceptions:
  WORD: {namespace: WORD, podLabels: {WORD: WORD}}
rbac:
  secrets: {WORD: [WORD]}
  createUserFacingClusterRoles: true
admissionPolicies: {warnings: true, exceptions: true, allowedIdentities: {WORD: [WORD]}}
startupTaint: example.com/agent:NoExecute
serviceMonitor: {enabled: true, labels: {WORD: WORD}}
prometheusRule: {enabled: true, labels: {WORD: WORD}}
grafanaDashboard: {enabled: true, labels: {WORD: WORD}}
openshift: {securityContextConstraints: true}
`

// TestStringsThatYAMLReadsOtherwise stay strings: names of releases, namespaces and objects may be
// "1234" or "true".
func TestStringsThatYAMLReadsOtherwise(t *testing.T) {
	for _, word := range []string{"1234", "true", "null", "1e3", "0x1f", "no"} {
		t.Run(word, func(t *testing.T) {
			t.Parallel()
			values := filepath.Join(t.TempDir(), "values.yaml")
			require.NoError(t, os.WriteFile(values, []byte(strings.ReplaceAll(stringValues, "WORD", strconv.Quote(word))), 0o600))
			out, err := helm(t, "template", word, ".", "--namespace="+word, "--kube-version=1.37", "--values="+values)
			require.NoError(t, err, out)
			for document := range strings.SplitSeq(out, "\n---\n") {
				var object map[string]any
				require.NoError(t, yaml.Unmarshal([]byte(document), &object), document)
				assertStrings(t, object)
			}
			assert.Regexp(t, `--host-token-uids=4294967294\n`, out, "Helm reads numbers as floats")
		})
	}
}

// TestEmptyAllowList refuses every identity, as a list without the ID does: emptying the list opens
// nothing.
func TestEmptyAllowList(t *testing.T) {
	text, err := render(t, "--set-json=admissionPolicies.allowedIdentities={}")
	require.NoError(t, err, text)
	assert.Subset(t, objects(t, text), []string{"ValidatingAdmissionPolicyBinding nmi-allowed-identities", "ConfigMap kube-system/nmi-allowed-identities"})
	text, err = render(t, "--set=admissionPolicies.allowedIdentities=null")
	require.NoError(t, err, text)
	assert.NotContains(t, text, "allowed-identities")
}

// TestOldValues takes what the values file of aad-pod-identity's chart has for its NMI.
func TestOldValues(t *testing.T) {
	text, err := render(t, "--values=testdata/aad-pod-identity.yaml")
	require.NoError(t, err, text)
	for _, want := range []string{
		"image: mcr.example/oss/nmi:v1.8.17", "imagePullPolicy: Always", "--operation-mode=standard", "--http-probe-port=8085",
		"--ipt-update-interval-sec=30", "--block-instance-metadata=true", "selector: \"demo\"", "name: azure-identity-binding",
		"  clientPassword:\n    name: credentials\n    namespace: shop\n",
	} {
		assert.Contains(t, text, want)
	}
	assert.NotContains(t, text, "retry-attempts")
}

// TestImageIsWhereReleasesAre: the chart, the manifests made from it, and make image name the image
// that the release workflow pushes.
func TestImageIsWhereReleasesAre(t *testing.T) {
	workflow, err := os.ReadFile("../../.github/workflows/release.yml")
	require.NoError(t, err)
	registry := regexp.MustCompile(`(?m)^  REGISTRY: (.*)$`).FindStringSubmatch(string(workflow))
	require.NotNil(t, registry)
	chart, err := os.ReadFile("Chart.yaml")
	require.NoError(t, err)
	owner := regexp.MustCompile(`(?m)^home: https://github.com/([^/]*)/nmi$`).FindStringSubmatch(string(chart))
	require.NotNil(t, owner)
	image := strings.Replace(registry[1], "${{ github.repository_owner }}", owner[1], 1) + "/nmi:"
	text, err := render(t)
	require.NoError(t, err, text)
	assert.Contains(t, text, "        image: "+image)
	makefile, err := os.ReadFile("../../Makefile")
	require.NoError(t, err)
	assert.Contains(t, string(makefile), "\nIMAGE ?= "+image)
}

// TestRedirectModes: the agent gets what programs need if it may use them, and not by default.
func TestRedirectModes(t *testing.T) {
	for mode, want := range map[string]struct{ programs, flag bool }{
		"iptables": {false, false}, "auto": {true, false}, "ebpf": {true, true}, "dnat": {false, true}, "none": {false, true},
	} {
		out, err := render(t, "--set=nmi.redirectMode="+mode)
		require.NoError(t, err, out)
		for _, part := range []string{"add: [NET_ADMIN, NET_RAW, BPF]", "mountPath: /host/sys/fs/bpf", "--cgroup-root=/host/sys/fs/cgroup", "mountPath: /host/sys/fs/cgroup"} {
			assert.Equal(t, want.programs, strings.Contains(out, part), "%s: %s", mode, part)
		}
		assert.Equal(t, want.flag, strings.Contains(out, "--redirect-mode="+mode), mode)
		if mode == "iptables" {
			byDefault, err := render(t)
			require.NoError(t, err)
			assert.Equal(t, byDefault, out)
		}
	}
}

// What an installation lacks is in the notes that Helm prints.
func TestNotes(t *testing.T) {
	const warning = "WARNING: federation.serviceAccounts is set and federation.rights is not"
	notes := func(args ...string) string {
		out, err := helm(t, append([]string{"install", "nmi", ".", "--namespace=kube-system", "--dry-run=client"}, args...)...)
		require.NoError(t, err, out)
		return out
	}
	assert.Contains(t, notes("--set=federation.serviceAccounts=true"), warning)
	assert.NotContains(t, notes("--set=federation.serviceAccounts=true,federation.rights=node"), warning)
	assert.NotContains(t, notes(), "WARNING")
}
