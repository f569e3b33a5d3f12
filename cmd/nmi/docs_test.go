package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/proxy"
)

const repository = "../.."

// filesNamed lists the repository's files whose names end so.
func filesNamed(t *testing.T, suffix string) (paths []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(repository, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == ".cache" || d.Name() == "node_modules"):
			return filepath.SkipDir
		case strings.HasSuffix(path, suffix):
			paths = append(paths, path)
		}
		return nil
	}))
	return paths
}

var (
	codeBlock  = regexp.MustCompile("(?ms)^ *```.*?^ *```")
	codeSpan   = regexp.MustCompile("`[^`\n]*`")
	linkTarget = regexp.MustCompile(`\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)"`)
	heading    = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	anchorID   = regexp.MustCompile(`<a id="([^"]+)">`)
	notInSlug  = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	linkText   = regexp.MustCompile(`\[([^]]*)\]\([^)]*\)`)
)

// linksIn lists where a page's links lead.
func linksIn(page string) (targets []string) {
	page = codeSpan.ReplaceAllString(codeBlock.ReplaceAllString(page, ""), "")
	for _, match := range linkTarget.FindAllStringSubmatch(page, -1) {
		targets = append(targets, match[1]+match[2])
	}
	return targets
}

// anchorsIn returns the names that a page's headings have on GitHub, and its explicit ones.
func anchorsIn(page string) map[string]bool {
	page = codeBlock.ReplaceAllString(page, "")
	all := make(map[string]bool)
	for _, match := range heading.FindAllStringSubmatch(page, -1) {
		text := strings.ToLower(linkText.ReplaceAllString(match[1], "$1"))
		all[strings.ReplaceAll(notInSlug.ReplaceAllString(text, ""), " ", "-")] = true
	}
	for _, match := range anchorID.FindAllStringSubmatch(page, -1) {
		all[match[1]] = true
	}
	return all
}

// TestLinks follows every link of every page that stays within the repository.
func TestLinks(t *testing.T) {
	for _, path := range filesNamed(t, ".md") {
		page, err := os.ReadFile(path)
		require.NoError(t, err)
		for _, target := range linksIn(string(page)) {
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			file, anchor, _ := strings.Cut(target, "#")
			to := path
			if file != "" {
				to = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(to); !assert.NoError(t, err, "%s links to %s", path, target) || anchor == "" {
				continue
			}
			text, err := os.ReadFile(to)
			require.NoError(t, err, "%s links to %s", path, target)
			assert.True(t, anchorsIn(string(text))[anchor], "%s links to %s: no such heading", path, target)
		}
	}
}

// TestDocsIndex requires docs/README.md to link each page of docs once.
func TestDocsIndex(t *testing.T) {
	index, err := os.ReadFile(repository + "/docs/README.md")
	require.NoError(t, err)
	count := make(map[string]int)
	for _, target := range linksIn(string(index)) {
		count[target]++
	}
	pages, err := filepath.Glob(repository + "/docs/*.md")
	require.NoError(t, err)
	require.NotEmpty(t, pages)
	for _, page := range pages {
		if name := filepath.Base(page); name != "README.md" {
			assert.Equal(t, 1, count[name], "links to %s in docs/README.md", name)
		}
	}
}

// TestSupportedKubernetes compares the versions that docs/support.md and the README name with
// those of the tests and of the chart.
func TestSupportedKubernetes(t *testing.T) {
	for _, tc := range []struct{ source, pattern, page, says string }{
		{"deploy/testbed/kube/go.mod", `k8s\.io/kubernetes v(\S+)`, "docs/support.md", "| %s | tested:"},
		{"deploy/chart/Chart.yaml", `kubeVersion: ">=(\d+\.\d+)`, "docs/support.md", "| %s and later |"},
		{"deploy/chart/Chart.yaml", `kubeVersion: ">=(\d+\.\d+)`, "README.md", "Kubernetes %s or later"},
	} {
		source, err := os.ReadFile(filepath.Join(repository, tc.source))
		require.NoError(t, err)
		version := regexp.MustCompile(tc.pattern).FindSubmatch(source)
		require.NotNil(t, version, tc.source)
		page, err := os.ReadFile(filepath.Join(repository, tc.page))
		require.NoError(t, err)
		want := fmt.Sprintf(tc.says, version[1])
		found := strings.Contains(string(page), want) // a failure need not show the page
		assert.True(t, found, "%s must say %q, by %s", tc.page, want, tc.source)
	}
}

// TestNamedTests requires the tests that docs/support.md names to exist.
func TestNamedTests(t *testing.T) {
	page, err := os.ReadFile(repository + "/docs/support.md")
	require.NoError(t, err)
	var sources strings.Builder
	for _, path := range filesNamed(t, "_test.go") {
		source, err := os.ReadFile(path)
		require.NoError(t, err)
		sources.Write(source)
	}
	names := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(page), -1)
	require.NotEmpty(t, names)
	for _, name := range names {
		found := strings.Contains(sources.String(), "\nfunc "+name[1]+"(t *testing.T)")
		assert.True(t, found, "docs/support.md names %s: no such test", name[1])
	}
}

func TestAnchors(t *testing.T) {
	got := anchorsIn("# A `b`, c/d: [e](f)?\n```\n# not\n```\n## Redirect modes\n<a id=\"x-y\"></a>\n")
	assert.Equal(t, map[string]bool{"a-b-cd-e": true, "redirect-modes": true, "x-y": true}, got)
}

// TestReasonsAreDocumented requires docs/status.md to list each reason of a refusal, and no other.
func TestReasonsAreDocumented(t *testing.T) {
	page, err := os.ReadFile(repository + "/docs/status.md")
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(page), "## Reasons")
	documented := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| `[^|]*").FindAllString(table, -1) {
		for _, word := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(row, -1) {
			documented[word[1]] = true
		}
	}
	listed := len(documented)
	for _, source := range []string{"/podresolver/reason.go", "/proxy/reason.go"} {
		text, err := os.ReadFile(repository + source)
		require.NoError(t, err)
		reasons := regexp.MustCompile(`(?m)^\t(\w+) += "(\w+)"`).FindAllSubmatch(text, -1)
		require.NotEmpty(t, reasons, source)
		for _, reason := range reasons {
			assert.Equal(t, string(reason[1]), string(reason[2]), source)
			assert.True(t, documented[string(reason[2])], "docs/status.md lacks %s of %s", reason[2], source)
			assert.Contains(t, proxy.Reasons(), string(reason[2]))
			delete(documented, string(reason[2]))
		}
	}
	assert.Empty(t, documented, "docs/status.md has reasons that there are not")
	assert.Len(t, proxy.Reasons(), listed)
}
