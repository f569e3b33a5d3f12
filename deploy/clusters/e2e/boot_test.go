//go:build cluster

package e2e

import (
	"context"
	"flag"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/clusters/imds/control"
)

var rebootsFlag = flag.Int("reboots", 20, "how often to reboot the node with the boot guard; without it a quarter of that")

func TestRebootsWithTheBootGuard(t *testing.T) {
	s := begin(t, "The node reboots again and again with bootGuard, and 12 pods ask from their first moment: none gets past.", theIMDS, theNode)
	s.allowFailures("the pods are refused in many ways")
	s.upgrade("bootGuard=true")
	const unit = "/etc/systemd/system/nmi-boot-guard.service"
	s.eventually("the boot guard's unit", func() bool {
		_, err := world.command(t.Context(), world.script, "exec", "test", "-s", unit)
		return err == nil
	})
	t.Cleanup(func() { // where it ended too early
		_, err := world.command(context.Background(), world.script, "exec", "rm", "-f", unit, "/etc/systemd/system/multi-user.target.wants/nmi-boot-guard.service")
		assert.NoError(t, err)
	})
	begun := time.Now()
	s.reboots(*rebootsFlag)
	s.note("%d reboots took %.0f s, until all pods had asked and the agent was ready", *rebootsFlag, time.Since(begun).Seconds())

	// And once without the agent, so that it is not its rules that came in time.
	require.NoError(t, world.helm(t.Context(), "uninstall", agentName, "--wait"))
	before := s.awaitContainers(nil, 0)
	s.run(world.script, "reboot")
	s.awaitContainers(before, 0)

	s.judgePods()
	s.kubectl("-n", s.namespace, "delete", "pods", "--all") // before they reach the metadata service
	s.cleanUp()
	assert.Empty(t, s.agentRules())
	_, err := world.command(t.Context(), world.script, "exec", "test", "-e", unit)
	assert.Error(t, err, "the unit is gone")
}

// TestRebootsWithoutTheBootGuard is why there is one. Its leaks are in a note, since
// nothing is promised.
func TestRebootsWithoutTheBootGuard(t *testing.T) {
	s := begin(t, "The same without bootGuard: docs/security.md says that pods may get past.", theIMDS, theNode)
	s.allowFailures("the pods are refused in many ways")
	n := max(*rebootsFlag/4, 1)
	leaking, leaks := s.reboots(n)
	s.note("%d of %d reboots leaked, %d requests in all", leaking, n, leaks)
	s.pods = nil // which have the node's tokens
	s.kubectl("-n", s.namespace, "delete", "pods", "--all")
	require.NoError(t, world.imds.Reset(t.Context()))
}

// reboots starts 12 pods that may have no token, and reboots the node n times.
func (s *scenario) reboots(n int) (leaking, leaks int) {
	s.t.Helper()
	ask := asker{requests: []request{s.refused()}, n: forever, every: 20 * time.Millisecond, fresh: true, timeout: 300 * time.Millisecond}
	for i := range 12 {
		s.start(pod{name: fmt.Sprintf("unbound-%d", i), askers: []asker{ask}, spec: func(spec *corev1.PodSpec) { spec.RestartPolicy = corev1.RestartPolicyAlways }})
	}
	s.note("requests are those of each pod's last two containers; leaks are those of all")
	before := s.awaitContainers(nil, 1)
	for range n {
		s.run(world.script, "reboot")
		before = s.awaitContainers(before, 1)
		var counts control.Counts
		counts, err := world.imds.Counts(s.t.Context())
		require.NoError(s.t, err)
		if counts.Leaks > leaks {
			leaking++
			leaks = counts.Leaks
		}
	}
	return leaking, leaks
}

// awaitContainers waits until all pods of the scenario have asked and so many agents are
// ready, each in another container than before, and returns those.
func (s *scenario) awaitContainers(before map[string]bool, agents int) (now map[string]bool) {
	s.t.Helper()
	s.eventually("the pods to run, and the agent to be ready", func() bool {
		now = make(map[string]bool)
		for _, p := range append(s.list(s.namespace, ""), s.list(agentNamespace, agentPods)...) {
			for _, c := range p.Status.ContainerStatuses {
				if c.Ready && !before[c.ContainerID] && s.hasWritten(p.Namespace, p.Name) {
					now[c.ContainerID] = true
				}
			}
		}
		return len(now) == len(s.pods)+agents
	})
	return now
}

// list returns pods, and none if the API server does not answer: it may be on the node.
func (s *scenario) list(namespace, selector string) []corev1.Pod {
	list, err := world.kube.CoreV1().Pods(namespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil
	}
	return list.Items
}

// hasWritten reports whether the log of the pod's container has begun.
func (s *scenario) hasWritten(namespace, name string) bool {
	log, err := world.kube.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{LimitBytes: new(int64(1))}).Stream(s.t.Context())
	if err != nil {
		return false
	}
	defer log.Close()
	text, err := io.ReadAll(log)
	return err == nil && len(text) > 0
}
