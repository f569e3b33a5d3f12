//go:build cluster

package e2e

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// TestUninstall follows docs/install.md, "Remove".
func TestUninstall(t *testing.T) {
	s := begin(t, "After helm uninstall pods are refused; after deploy/cleanup.yaml nothing of the agent's is left on the node.", theIMDS, theNode)
	s.allowFailures("no agent runs any more")
	s.restoreAgent()
	s.underLoad()
	require.NoError(t, world.helm(t.Context(), "uninstall", agentName, "--wait"))
	refused := len(s.failed(bound, overNewOnes))
	s.eventually("new connections to be refused", func() bool { return len(s.failed(bound, overNewOnes)) > refused+20 })
	assert.Contains(t, s.agentRules(), "nmi-guard")
	s.end(bound, unbound) // before they reach the metadata service

	s.cleanUp()
	assert.Empty(t, s.agentRules())
	s.start(pod{name: "afterwards", askers: []asker{asks(s.nodeToken())}})
	s.finish()
	assert.Equal(t, 1, s.imds().Leaks)
	require.NoError(t, world.imds.Reset(t.Context())) // meant to be
}

// cleanUp applies deploy/cleanup.yaml with this image, and deletes it when it is done.
func (s *scenario) cleanUp() {
	s.t.Helper()
	cleanup := filepath.Join(s.t.TempDir(), "cleanup.yaml")
	s.run("bash", "-c", `sed "s#image: .*/nmi:.*#image: $0#" deploy/cleanup.yaml >"$1"`, *imageFlag, cleanup)
	s.kubectl("apply", "-f", cleanup)
	s.kubectl("-n", agentNamespace, "rollout", "status", "daemonset/nmi-cleanup", "--timeout="+patience.String())
	s.kubectl("delete", "-f", cleanup)
}

// agentRules returns what the agent has in the node's kernel, "" if nothing.
func (s *scenario) agentRules() string {
	s.t.Helper()
	return s.onNode("bash", "-c", `{ iptables-save; ip rule list; ip address show dev lo; } | grep -E 'aad-metadata|nmi-|^1[012]:|169\.254\.' || true`)
}

// end ends pods that would ask for ever. Their logs stay.
func (s *scenario) end(names ...string) {
	s.t.Helper()
	for _, name := range names {
		s.kubectl("-n", s.namespace, "patch", "pod", name, `--patch={"spec":{"activeDeadlineSeconds":1}}`)
	}
	for _, name := range names {
		s.eventually("pod "+name+" to end", func() bool {
			status := s.get(name).Status
			for _, c := range status.ContainerStatuses {
				if c.State.Terminated == nil {
					return false
				}
			}
			return status.Phase == corev1.PodFailed
		})
	}
}
