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
		{"../manifests/ebpf", []string{"daemonset.yaml"}, []string{"--set=nmi.redirectMode=ebpf"}},
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
		"operationMode=standard,rbac.createUserFacingClusterRoles=true,rbac.secrets.shop={a},federation.serviceAccounts=true,federation.rights=namespaces,federation.namespaces={shop},serviceMonitor.enabled=true,prometheusRule.enabled=true,grafanaDashboard.enabled=true,openshift.securityContextConstraints=true"
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

// TestFederationRights: the chart gives the rights of deploy/federation, which that of e2e tries.
func TestFederationRights(t *testing.T) {
	rules := func(text string) (all []string) {
		for document := range strings.SplitSeq(text, "\n---\n") {
			var role struct {
				Kind  string
				Rules []any
			}
			require.NoError(t, yaml.Unmarshal([]byte(document), &role))
			if len(role.Rules) == 0 {
				continue
			}
			text, err := yaml.Marshal(role)
			require.NoError(t, err)
			all = append(all, string(text))
		}
		slices.Sort(all)
		return all
	}
	for file, set := range map[string]string{
		"service-accounts": "federation.serviceAccounts=true",
		"own-node":         "federation.rights=node",
		"namespace":        "federation.rights=namespaces,federation.namespaces={shop}",
		"cluster":          "federation.rights=cluster",
	} {
		manifest, err := os.ReadFile("../federation/" + file + ".yaml")
		require.NoError(t, err)
		files := renderFiles(t, "--set="+set)
		text := files["federation.yaml"] + files["admission.yaml"]
		assert.Equal(t, rules(string(manifest)), rules(text), file)
		assert.Equal(t, file == "own-node", strings.Contains(files["daemonset.yaml"], "- --federation-as-node\n"), file)
		files = renderFiles(t, "--set="+set+",rbac.enabled=false")
		assert.Empty(t, files["federation.yaml"], file)
		assert.NotContains(t, files["admission.yaml"], "rbac.authorization.k8s.io", file)
		if file == "own-node" {
			assert.Equal(t, []string{"ValidatingAdmissionPolicy nmi-federation-own-node", "ValidatingAdmissionPolicyBinding nmi-federation-own-node"}, objects(t, files["admission.yaml"]))
			another := renderFiles(t, "--set="+set+",federation.audience=api://AKSIdentityBinding")["admission.yaml"]
			assert.Contains(t, another, `expression: "'api://AKSIdentityBinding'"`)
			assert.Contains(t, another, `resources: ["api://AKSIdentityBinding"]`)
		}
	}
	assert.Empty(t, renderFiles(t)["federation.yaml"])
	out, err := render(t, "--kube-version=1.35.4", "--set=federation.rights=node")
	require.Error(t, err)
	assert.Contains(t, out, "federation.rights=node needs Kubernetes 1.36 or later (constrained impersonation); this cluster has v1.35.4")
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
