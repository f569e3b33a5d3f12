//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// load has eight askers ask every 20 ms, half of them over a connection that they keep.
func (s *scenario) load() {
	s.t.Helper()
	s.bind("cart", cart)
	kept := everySoOften(s.token(cart), 20*time.Millisecond)
	fresh := kept
	fresh.fresh = true
	for i := range 4 {
		s.start(pod{name: fmt.Sprintf("load-%d", i), binding: "cart", askers: []asker{kept, fresh}})
	}
	s.running("load-0", "load-1", "load-2", "load-3")
}

func TestRollingUpdates(t *testing.T) {
	s := begin(t, "20 rolling updates one after the other, under load: no request fails.", theIMDS, theNode)
	tags := []string{*imageFlag, *imageFlag + "-again"}
	s.onNode("ctr", "-n", "k8s.io", "images", "tag", "--force", tags[0], tags[1])
	t.Cleanup(func() { s.removeImage(tags[1]) })
	s.restoreAgent()
	s.load()
	begun := time.Now()
	for i := range 20 {
		s.setImage(tags[(i+1)%2])
		require.NoError(t, world.awaitRollout(t.Context()), "update %d", i)
	}
	s.note("20 updates took %.0f s", time.Since(begun).Seconds())
}

// setImage is "kubectl set image".
func (s *scenario) setImage(image string) {
	s.t.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":%q,"image":%q}]}}}}`, agentName, image)
	_, err := world.kube.AppsV1().DaemonSets(agentNamespace).Patch(s.t.Context(), agentName, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	require.NoError(s.t, err)
}

func (s *scenario) removeImage(image string) {
	_, err := world.command(context.Background(), world.script, "exec", "ctr", "-n", "k8s.io", "images", "remove", image)
	assert.NoError(s.t, err)
}

func TestRolloutToABadFlag(t *testing.T) {
	s := begin(t, "A rollout to a bad flag stops: the old agent goes on to serve, and the new one's log says what is wrong.", theIMDS)
	s.failingRollout("nmi.extraArgs={--no-such-flag}", func(fresh corev1.Pod) bool {
		status := fresh.Status.ContainerStatuses
		return len(status) == 1 && status[0].RestartCount > 0
	})
	assert.Contains(t, s.kubectl("-n", agentNamespace, "logs", s.freshAgent().Name), "unknown flag: --no-such-flag")
	s.kubectl("-n", agentNamespace, "rollout", "undo", "daemonset/"+agentName)
	s.kubectl("-n", agentNamespace, "rollout", "status", "daemonset/"+agentName, "--timeout="+patience.String())
}

func TestRolloutToAMissingImage(t *testing.T) {
	s := begin(t, "A rollout to an image that cannot be pulled stops: the old agent goes on to serve.", theIMDS)
	s.failingRollout("nmi.tag=no-such-tag", func(fresh corev1.Pod) bool {
		status := fresh.Status.ContainerStatuses
		return len(status) == 1 && status[0].State.Waiting != nil && strings.HasPrefix(status[0].State.Waiting.Reason, "ErrImage")
	})
	require.NoError(t, world.helm(t.Context(), "rollback", agentName))
	require.NoError(t, world.awaitRollout(t.Context()))
}

// failingRollout changes a value of the chart, and waits until the new agent has failed.
func (s *scenario) failingRollout(value string, failed func(fresh corev1.Pod) bool) {
	s.t.Helper()
	old := s.agents()
	require.Len(s.t, old, 1)
	s.load()
	s.restoreAgent()
	require.NoError(s.t, world.apply(s.t.Context(), value))
	s.eventually("the new agent to fail", func() bool { return len(s.agents()) == 2 && failed(s.freshAgent()) })
	out, err := world.command(s.t.Context(), "kubectl", "-n", agentNamespace, "rollout", "status", "daemonset/"+agentName, "--timeout=5s")
	require.Error(s.t, err, "the rollout does not end")
	s.note("kubectl rollout status: %s", strings.Join(strings.Fields(out), " "))
	for _, p := range s.agents() {
		if p.UID == old[0].UID {
			assert.True(s.t, isReady(p), "the old agent is ready")
			return
		}
	}
	assert.Fail(s.t, "the old agent is gone")
}

// freshAgent returns the newest of the agent's pods.
func (s *scenario) freshAgent() (fresh corev1.Pod) {
	s.t.Helper()
	for _, p := range s.agents() {
		if fresh.Name == "" || fresh.CreationTimestamp.Before(&p.CreationTimestamp) {
			fresh = p
		}
	}
	return fresh
}

func isReady(p corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
