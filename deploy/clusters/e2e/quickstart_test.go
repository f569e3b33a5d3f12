//go:build cluster

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestQuickStart runs the commands of docs/quickstart.md as they are on the page, but for
// the namespace, and for curl's image, which no test cluster has.
func TestQuickStart(t *testing.T) {
	s := begin(t, "The commands of docs/quickstart.md, from the rollout on, show what the page says.", theIMDS)
	page, err := os.ReadFile(filepath.Join(world.root, "docs", "quickstart.md"))
	require.NoError(t, err)
	kind, aks, found := strings.Cut(string(page), "\n## AKS\n")
	require.True(t, found)

	s.kubectlRun("report", "", asks(s.refused()))
	s.shell(command(t, kind, "kubectl wait --for=jsonpath='{.status.phase}'=Succeeded pod/report"))
	assert.Contains(t, s.shell(command(t, kind, "kubectl logs report")), "Identity not found")
	s.shell(command(t, kind, "kubectl -n kube-system rollout status"))
	assert.Contains(t, s.shell(command(t, kind, "kubectl -n kube-system logs daemonset/nmi | grep")), s.namespace)

	s.shell("CLIENT_ID="+cart.ClientID+" ID="+cart.ResourceID, command(t, aks, "kubectl apply -f - <<EOF"))
	stays := asker{requests: []request{s.token(cart)}, n: forever, every: time.Minute}
	s.kubectlRun("cart", "cart", stays)
	s.shell(command(t, aks, "kubectl -n shop wait"))
	assert.Contains(t, s.shell(strings.Replace(command(t, aks, "kubectl -n shop logs"), "--follow", "", 1)), cart.ClientID)
	assert.Contains(t, s.shell(command(t, aks, "node=$(kubectl -n shop get pod cart")), cart.ClientID)
}

// command returns the command of a page that begins so, with the lines that belong to it.
func command(t *testing.T, page, prefix string) string {
	t.Helper()
	_, rest, found := strings.Cut(page, "\n"+prefix)
	require.True(t, found, "the page has no command %q", prefix)
	block, _, _ := strings.Cut(rest, "\n```")
	if strings.HasSuffix(prefix, "<<EOF") {
		document, _, found := strings.Cut(block, "\nEOF\n")
		require.True(t, found)
		return prefix + document + "\nEOF\n"
	}
	if !strings.HasPrefix(prefix, "node=") { // that one is the whole block
		block, _, _ = strings.Cut(block, "\n")
		block, _, _ = strings.Cut(block, "  #")
	}
	return prefix + block
}

// shell runs commands of a page in the scenario's namespace.
func (s *scenario) shell(lines ...string) string {
	s.t.Helper()
	script := strings.NewReplacer("kubectl wait", "kubectl -n "+s.namespace+" wait", "kubectl logs", "kubectl -n "+s.namespace+" logs", "-n shop", "-n "+s.namespace, "namespace: shop", "namespace: "+s.namespace, "shop/", s.namespace+"/").Replace(strings.Join(lines, "\n"))
	return s.run("bash", "-euc", script)
}

// kubectlRun is "kubectl run", with a pod whose answers are judged.
func (s *scenario) kubectlRun(name, binding string, a asker) {
	s.t.Helper()
	args := []string{"-n", s.namespace, "run", name, "--image=" + *askerFlag, "--restart=Never", "--image-pull-policy=IfNotPresent"}
	if binding != "" {
		args = append(args, "--labels=aadpodidbinding="+binding)
	}
	s.kubectl(append(append(args, "--"), a.container(name).Args...)...)
	s.pods = append(s.pods, &runningPod{pod: pod{name: name}, askerOf: map[string]asker{name: a}})
	s.eventually("answers of pod "+name, func() bool {
		if len(s.get(name).Status.ContainerStatuses) == 0 {
			return false
		}
		all, _ := s.answers(name, name)
		return len(all) > 0
	})
}
