// Package chart tests the Helm chart in this directory, and keeps what is made of it current: the
// manifests of deploy/manifests, the table of README.md, and the golden files in testdata.
// "make manifests" writes them.
package chart

import (
	"bytes"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the files that are made of the chart")

// helmBinary builds Helm, once, and returns its path.
var helmBinary = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "tool", "-modfile=../../.ci/helm/go.mod", "-n", "helm").Output()
	return string(bytes.TrimSpace(out)), err
})

// helm runs Helm and returns what it prints, which is an error's text if it fails.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := helmBinary()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), path, args...)
	var out, errors bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errors
	if err := cmd.Run(); err != nil {
		return errors.String(), err
	}
	return out.String(), nil
}

func render(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helm(t, append([]string{"template", "nmi", ".", "--namespace=kube-system", "--kube-version=1.37"}, args...)...)
}

// renderFiles returns what each template makes of the values, without Helm's own comments.
func renderFiles(t *testing.T, args ...string) map[string]string {
	t.Helper()
	text, err := render(t, args...)
	require.NoError(t, err, text)
	files := make(map[string]string)
	for document := range strings.SplitSeq("\n"+text, "\n---\n# Source: nmi/templates/") {
		name, content, found := strings.Cut(document, "\n")
		if !found || name == "" {
			continue
		}
		if files[name] != "" {
			files[name] += "---\n"
		}
		files[name] += strings.TrimSpace(content) + "\n"
	}
	return files
}

// current checks that a file has the content, or writes it.
func current(t *testing.T, path, content string) {
	t.Helper()
	if *update {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
		return
	}
	stored, err := os.ReadFile(path)
	require.NoError(t, err, "run make manifests")
	assert.Equal(t, string(stored), content, "%s is not what the chart makes: run make manifests", path)
}

func TestGoldenFiles(t *testing.T) {
	values, err := filepath.Glob("testdata/*.values.yaml")
	require.NoError(t, err)
	require.Len(t, values, 4)
	for _, path := range values {
		name := strings.TrimSuffix(path, ".values.yaml")
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			args := []string{"--values=" + path}
			if name == "testdata/everything" {
				args = append(args, "--namespace=identity")
			}
			text, err := render(t, args...)
			require.NoError(t, err, text)
			current(t, name+".yaml", text)
		})
	}
}

// TestManifests compares the files that kubectl applies with the chart's output.
func TestManifests(t *testing.T) {
	const generated = "# Made from deploy/chart by make manifests.\n"
	crds, err := os.ReadFile("crds/crds.yaml")
	require.NoError(t, err)
	current(t, "../manifests/crds.yaml", string(crds))
	for _, m := range []struct {
		dir   string
		files []string
		args  []string
	}{
		{"../manifests", []string{"account.yaml", "daemonset.yaml", "exception.yaml"}, nil},
		// As in aad-pod-identity's deploy/infra/deployment-rbac.yaml.
		{"../manifests/standard", []string{"account.yaml", "daemonset.yaml", "exception.yaml"}, []string{"--namespace=default", "--set=operationMode=standard"}},
		{"..", []string{"cleanup.yaml"}, []string{"--set=cleanup=true,bootGuard=true"}},
		{"../cilium", []string{"local-redirect-policy.yaml"}, []string{"--set=nmi.redirectMode=none,cilium.localRedirectPolicy=true"}},
	} {
		files := renderFiles(t, m.args...)
		for _, name := range m.files {
			require.NotEmpty(t, files[name], name)
			current(t, filepath.Join(m.dir, name), generated+files[name])
		}
	}
}

var (
	documentKind      = regexp.MustCompile(`(?m)^kind: (.*)$`)
	documentName      = regexp.MustCompile(`(?m)^  name: (.*)$`)
	documentNamespace = regexp.MustCompile(`(?m)^  namespace: (.*)$`)
)

// objects returns the kind, namespace and name of each object, in the order in which they are applied.
func objects(t *testing.T, text string) []string {
	t.Helper()
	var all []string
	for document := range strings.SplitSeq(text, "\n---\n") {
		kind, name, namespace := documentKind.FindStringSubmatch(document), documentName.FindStringSubmatch(document), documentNamespace.FindStringSubmatch(document)
		if kind == nil {
			continue
		}
		require.NotNil(t, name, document)
		object := kind[1] + " " + name[1]
		if namespace != nil {
			object = kind[1] + " " + namespace[1] + "/" + name[1]
		}
		all = append(all, object)
	}
	return all
}

// TestTwoReleases have no object in common, but for those that both are told to make.
func TestTwoReleases(t *testing.T) {
	all := "--set=admissionPolicies.warnings=true,admissionPolicies.exceptions=true,admissionPolicies.allowedIdentities.shop={a},startupTaint=example.com/a:NoSchedule," +
		"operationMode=standard,rbac.createUserFacingClusterRoles=true,rbac.secrets.shop={a},serviceMonitor.enabled=true,openshift.securityContextConstraints=true"
	one, err := render(t, all)
	require.NoError(t, err, one)
	other, err := render(t, all, "--set=fullnameOverride=agent")
	require.NoError(t, err, other)
	first, second := objects(t, one), objects(t, other)
	assert.Len(t, second, len(first))
	assert.Greater(t, len(first), 25)
	for _, object := range second {
		assert.NotContains(t, first, object)
	}
}

// TestStartupTaintRights are given once, with the policy that limits them, and not by a chart that
// is to give none.
func TestStartupTaintRights(t *testing.T) {
	const taint = "--set=startupTaint=example.com/a=b:NoExecute"
	text, err := render(t, taint)
	require.NoError(t, err, text)
	assert.Equal(t, 1, strings.Count(text, "resources: [nodes]"))
	assert.Contains(t, text, "- --startup-taint=example.com/a=b:NoExecute\n")
	assert.Contains(t, text, `"'example.com/a'"`)
	assert.Contains(t, text, `"'NoExecute'"`)
	text, err = render(t, taint, "--set=rbac.enabled=false")
	require.NoError(t, err, text)
	assert.NotContains(t, text, "rbac.authorization.k8s.io")
	assert.Contains(t, objects(t, text), "ValidatingAdmissionPolicyBinding nmi-startup-taint")
	text, err = render(t, "--set=admissionPolicies.exceptions=true")
	require.NoError(t, err, text)
	assert.NotContains(t, text, "nodes]")
}

// TestOrder has the account before the pods that need it, whoever applies the files: without it the
// DaemonSet controller reports "serviceaccount not found".
func TestOrder(t *testing.T) {
	text, err := render(t)
	require.NoError(t, err, text)
	applied := objects(t, text)
	assert.Less(t, slices.Index(applied, "ServiceAccount kube-system/nmi"), slices.Index(applied, "DaemonSet kube-system/nmi"))
	entries, err := os.ReadDir("../manifests")
	require.NoError(t, err)
	assert.Equal(t, "account.yaml", entries[0].Name(), "kubectl applies files by name")
	account, err := os.ReadFile("../manifests/account.yaml")
	require.NoError(t, err)
	assert.Equal(t, "ServiceAccount kube-system/nmi", objects(t, string(account))[0])
}

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
		"nmi.redirectMode=ebpf":            "at '/nmi/redirectMode': value must be one of 'auto', 'redirect', 'dnat', 'none'",
		"operationMode=Managed":            "at '/operationMode': value must be one of 'managed', 'standard'",
		"nmi.probePort=http":               "at '/nmi/probePort': 'http' does not match pattern",
		"nmi.probePort=70000":              "at '/nmi/probePort': maximum: got 70,000, want 65,535",
		"nmi.digest=sha256:1234":           "at '/nmi/digest': 'sha256:1234' does not match pattern",
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
		"mic.image=mic":                                                 "mic: this chart does not install MIC",
		"adminsecret.cloud=a":                                           "adminsecret: it is MIC's",
		"rbac.allowAccessToSecrets=true":                                "Name those of service principals in rbac.secrets",
		"rbac.pspEnabled=true":                                          "Kubernetes has no PodSecurityPolicies",
		"cilium.localRedirectPolicy=true":                               "cilium.localRedirectPolicy needs nmi.redirectMode=none",
		"nmi.updateStrategy.type=Recreate":                              "at '/nmi/updateStrategy/type': value must be one of 'RollingUpdate', 'OnDelete'",
		"serviceMonitor.interval=30":                                    "at '/serviceMonitor/interval'",
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

func TestLint(t *testing.T) {
	out, err := helm(t, "lint", ".", "--strict")
	require.NoError(t, err, out)
}

func TestPackage(t *testing.T) {
	dir := t.TempDir()
	out, err := helm(t, "package", ".", "--destination="+dir)
	require.NoError(t, err, out)
	out, err = helm(t, "template", "nmi", filepath.Join(dir, "nmi-0.1.0.tgz"), "--set=admissionPolicies.exceptions=true")
	require.NoError(t, err, out)
	assert.Contains(t, out, "name: nmi-excepted-pods", "a file outside of the chart's directory")
	listed, err := exec.CommandContext(t.Context(), "tar", "tzf", filepath.Join(dir, "nmi-0.1.0.tgz")).CombinedOutput()
	require.NoError(t, err)
	assert.NotContains(t, string(listed), "testdata")
	assert.NotContains(t, string(listed), ".go")
}

func TestReadme(t *testing.T) {
	const marker = "<!-- The table is made of values.yaml: make manifests -->\n"
	stored, err := fs.ReadFile(os.DirFS("."), "README.md")
	require.NoError(t, err)
	text, _, found := strings.Cut(string(stored), marker)
	require.True(t, found)
	values, err := os.ReadFile("values.yaml")
	require.NoError(t, err)
	current(t, "README.md", text+marker+"\n"+valuesTable(t, string(values)))
}

func TestOldKubernetes(t *testing.T) {
	for _, set := range []string{"startupTaint=a:NoSchedule", "admissionPolicies.warnings=true"} {
		out, err := render(t, "--kube-version=1.29.3", "--set="+set)
		require.Error(t, err, set)
		assert.Contains(t, out, "need Kubernetes 1.30 or later (ValidatingAdmissionPolicy); this cluster has v1.29.3")
		_, err = render(t, "--kube-version=1.30.0", "--set="+set)
		require.NoError(t, err, set)
	}
}
