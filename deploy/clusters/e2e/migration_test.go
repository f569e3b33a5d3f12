//go:build cluster

package e2e

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestMigration goes from the NMI of aad-pod-identity to the agent and back, with the
// commands of docs/migrating.md, while pods ask.
func TestMigration(t *testing.T) {
	t.Run("managed", func(t *testing.T) { migrate(t, "managed", false) })
	t.Run("standard", func(t *testing.T) { migrate(t, "standard", false) })
	t.Run("standard-helm", func(t *testing.T) { migrate(t, "standard", true) })
}

func migrate(t *testing.T, mode string, helm bool) {
	t.Helper()
	s := begin(t, "From aad-pod-identity's NMI ("+mode+" mode) to the agent and back by docs/migrating.md: no pod gets the node's token.", theIMDS, theNode)
	if os.Getenv("KUBE_PROXY") == "nftables" {
		s.skip("the old NMI needs route_localnet, which kube-proxy sets in its mode iptables alone")
	}
	s.allowFailures("the old NMI's answers are its own; in between pods are refused")
	s.unlimitedIMDS()
	old := s.replaceAgentBy(mode, oldImage)
	if mode == "standard" {
		s.assign(bound, cart)
	}
	s.underLoad()
	p := s.migratingPage(old)

	way := 0 // of each section: kubectl's, or Helm's
	if helm {
		way = 1
		p.useHelm()
		p.run("With Helm", 0)
	} else {
		p.run("Prepare", 0)
		p.shell(`sed -i "s#image: .*/nmi:.*#image: ` + *imageFlag + `#" nmi.yaml`)
	}
	p.run("Start the agent beside the old NMI", way)
	s.served(bound)
	if helm { // otherwise the agent's DaemonSet has replaced it
		p.run("Remove the old NMI", 0)
	}
	s.served(bound)
	p.run("Move the agent to its own port", way)
	p.run("Clean up", 0)
	s.served(bound)
	assert.NotContains(t, s.onNode("iptables", "-t", "nat", "-S", "aad-metadata"), "127.0.0.1:2579", "rules of the old NMI")
	s.noteOutage()

	p.run("Going back", way)
	s.apply(old)
	s.served(bound)
	s.kubectl("delete", "--cascade=foreground", "-f", old.manifest) // and with it goes its redirect
	refused := len(s.failed(bound, overNewOnes))
	s.eventually("pods to be refused", func() bool { return len(s.failed(bound, overNewOnes)) > refused+3 }) // the fences refuse slowly
	assert.NotContains(t, s.agentRules(), "aad-metadata")
	assert.Contains(t, s.agentRules(), "nmi-guard")
	s.end(bound, unbound) // or they ask until the agent is there for the next scenario
}

// migratingPage is docs/migrating.md, whose commands it runs in a directory of their own.
type migratingPage struct {
	s         *scenario
	text, dir string
	replaced  []string // in commands, pairs of old and new
}

func (s *scenario) migratingPage(old oldNMI) *migratingPage {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(world.root, "docs", "migrating.md"))
	require.NoError(s.t, err)
	p := &migratingPage{s: s, text: string(text), dir: s.t.TempDir(), replaced: []string{
		"-n kube-system delete serviceaccount", "-n " + old.namespace + " delete serviceaccount",
		"<namespace>", old.namespace, "<name>", "nmi",
		"kubectl apply -f <the manifest of aad-pod-identity>", "",
	}}
	require.NoError(s.t, os.Symlink(filepath.Join(world.root, "deploy"), filepath.Join(p.dir, "deploy")))
	manifests := "deploy/manifests"
	if old.mode == "standard" {
		manifests += "/standard"
		p.replaced = append(p.replaced, "manifests=deploy/manifests ", "manifests="+manifests+" ")
	}
	s.t.Cleanup(func() { // where it ended too early, the DaemonSet is still there
		for _, name := range []string{"daemonset", "account", "exception"} {
			_, err := world.command(context.Background(), "kubectl", "delete", "--ignore-not-found", "--cascade=foreground", "-f", manifests+"/"+name+".yaml")
			assert.NoError(s.t, err)
		}
	})
	return p
}

// useHelm has its commands call helm, and writes the values of our image.
func (p *migratingPage) useHelm() {
	p.s.t.Helper()
	helm, err := world.helmPath(p.s.t.Context())
	require.NoError(p.s.t, err)
	require.NoError(p.s.t, os.Symlink(helm, filepath.Join(p.dir, "helm")))
	repository, image, tag, err := splitImage(*imageFlag)
	require.NoError(p.s.t, err)
	values := strings.Replace(p.block("With Helm", "yaml", 0), "nmi: {", "image: {repository: "+repository+"}\nnmi: {image: "+image+", tag: "+tag+", ", 1)
	require.NoError(p.s.t, os.WriteFile(filepath.Join(p.dir, "nmi-values.yaml"), []byte(values), 0o600))
	p.replaced = append(p.replaced, "helm -n kube-system uninstall nmi", "helm -n kube-system uninstall nmi --wait")
	p.s.t.Cleanup(func() { // where it ended too early
		assert.NoError(p.s.t, world.helm(context.Background(), "uninstall", agentName, "--ignore-not-found", "--wait"))
	})
}

var codeBlock = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")

// block is the i-th block of a language below a heading, "" for commands.
func (p *migratingPage) block(heading, language string, i int) string {
	p.s.t.Helper()
	_, section, found := strings.Cut(p.text, "# "+heading+"\n")
	require.True(p.s.t, found, heading)
	for _, block := range codeBlock.FindAllStringSubmatch(section, -1) {
		if block[1] != language {
			continue
		}
		if i == 0 {
			return block[2]
		}
		i--
	}
	require.Fail(p.s.t, "no such block", heading)
	return ""
}

// run runs a block of commands below a heading.
func (p *migratingPage) run(heading string, i int) {
	p.s.t.Helper()
	p.shell(strings.NewReplacer(p.replaced...).Replace(p.block(heading, "", i)))
}

func (p *migratingPage) shell(script string) {
	p.s.t.Helper()
	p.s.run("bash", "-euo", "pipefail", "-c", "cd "+p.dir+"; PATH=.:$PATH\n"+script)
}
