//go:build cluster

package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

const refusedMeanwhile = "no agent runs for a moment"

func TestAgentDeleted(t *testing.T) {
	s := begin(t, "The agent's pod is deleted: an SDK notices nothing, and no pod gets past.", theIMDS)
	s.allowFailures(refusedMeanwhile)
	s.underLoad()
	old := s.agentContainer()
	s.kubectl("-n", agentNamespace, "delete", "pod", "--selector="+agentPods)
	s.agentAfter(old)
	s.recovered()
}

func TestAgentKilled(t *testing.T) {
	s := begin(t, "The agent is killed (SIGKILL): an SDK notices nothing, and no pod gets past.", theIMDS, theNode)
	s.allowFailures(refusedMeanwhile)
	s.underLoad()
	old := s.agentContainer()
	s.onNode("kill", "-KILL", s.agentPID())
	s.agentAfter(old)
	s.recovered()
}

func TestAgentOutOfMemory(t *testing.T) {
	s := begin(t, "The agent runs out of memory: an SDK notices nothing, and no pod gets past.", theIMDS, theNode)
	s.allowFailures(refusedMeanwhile)
	s.underLoad()
	old := s.agentContainer()
	s.onNode("timeout", "100", "bash", "-c", takeMemory, "takeMemory", s.agentPID())
	s.agentAfter(old)
	last := s.agents()[0].Status.ContainerStatuses[0].LastTerminationState.Terminated
	require.NotNil(t, last)
	assert.EqualValues(t, 128+syscall.SIGKILL, last.ExitCode)
	assert.Contains(t, []string{"OOMKilled", "Error"}, last.Reason, "containerd may hear of the kernel's kill too late to tell it apart")
	s.recovered()
}

// takeMemory lowers the limit of a process's cgroup until the kernel kills the process. Version 2
// takes any limit, and kills at once; version 1 takes none below what it cannot free, and
// kills at the next allocation.
const takeMemory = `
pid=$1
file=$(sed -n 's#^0::\(/.*\)#/sys/fs/cgroup\1/memory.max#p' /proc/$pid/cgroup)
[ -e "$file" ] || file=$(sed -n 's#^[0-9]*:memory:\(/.*\)#/sys/fs/cgroup/memory\1/memory.limit_in_bytes#p' /proc/$pid/cgroup)
while [ -e /proc/$pid ]; do
	for mebibytes in $(seq 64); do
		echo ${mebibytes}M >"$file" && break
	done
done 2>/dev/null
exit 0 # the last of these failed when the cgroup had gone
`

func TestKubeletRestart(t *testing.T) {
	s := begin(t, "The kubelet is restarted: no request fails.", theIMDS, theNode)
	s.underLoad()
	s.run(world.script, "restart", "kubelet")
	// It answers once more when it can write a log out.
	s.served(bound)
}

func TestAPIServerAway(t *testing.T) {
	s := begin(t, "The API server is away: known pods are served, a pod with a new address waits until it is back.", theIMDS, theNode)
	s.allowFailures("the pod with a new address is told to come back (503)")
	s.underLoad()
	// A pod whose sandbox ends gets another, with another address, from the kubelet alone.
	sdk := everySoOften(s.token(cart), 100*time.Millisecond)
	sdk.retry = true
	once := everySoOften(s.token(cart), 100*time.Millisecond)
	s.start(pod{name: "moved", binding: "cart", askers: []asker{once, sdk}, spec: func(spec *corev1.PodSpec) { spec.RestartPolicy = corev1.RestartPolicyAlways }})
	s.running("moved")
	s.served("moved")
	address := s.get("moved").Status.PodIP

	s.run(world.script, "api-server", "stop")
	start := func() { s.run(world.script, "api-server", "start") }
	stopped := true
	t.Cleanup(func() {
		if stopped {
			start()
		}
	})
	begun := time.Now()
	s.onNode("bash", "-c", endSandbox, "endSandbox", s.namespace, "moved")
	s.onNode("timeout", "100", "bash", "-c", awaitText, "awaitText", s.namespace, "moved", `"Status":503`)
	away := time.Since(begun)
	start()
	stopped = false
	s.served("moved")
	s.served(bound)
	s.note("the API server was away for %s", away.Round(time.Second))

	assert.NotEqual(t, address, s.get("moved").Status.PodIP)
	for _, known := range []string{overOneConnection, overNewOnes, asAnSDK} {
		assert.Empty(t, s.failed(bound, known), "known pods are served")
	}
	for _, a := range s.failed("moved", "ask-0") {
		if a.Status != 503 || a.RetryAfter == "" {
			// Its last request before the end.
			assert.Zero(t, a.Status, "%+v", a)
		}
	}
	assert.Empty(t, s.failed("moved", "ask-1"), "an SDK waits")
}

// endSandbox <namespace> <pod> kills a pod's sandbox.
const endSandbox = `
set -e
filter="labels.\"io.kubernetes.pod.namespace\"==$1,labels.\"io.kubernetes.pod.name\"==$2,labels.\"io.cri-containerd.kind\"==sandbox"
ctr -n k8s.io tasks kill -s SIGKILL "$(ctr -n k8s.io containers list -q "$filter")"
`

// awaitText <namespace> <pod> <text> waits until one of the pod's logs has the text.
const awaitText = `until grep -qrF -- "$3" /var/log/pods/"$1_$2"_*/; do sleep 0.1; done`

// recovered waits until the pods are served again, and checks that only those failed that
// do not try again.
func (s *scenario) recovered() {
	s.t.Helper()
	s.served(bound)
	s.noteOutage()
	assert.Empty(s.t, s.failed(bound, asAnSDK), "an SDK tries again, and then has its token")
}

// agentContainer returns the ID of the container in which the agent runs.
func (s *scenario) agentContainer() string {
	s.t.Helper()
	agents := s.agents()
	require.Len(s.t, agents, 1)
	require.Len(s.t, agents[0].Status.ContainerStatuses, 1)
	return agents[0].Status.ContainerStatuses[0].ContainerID
}

// agentAfter waits until the agent runs in another container, and is ready.
func (s *scenario) agentAfter(old string) {
	s.t.Helper()
	s.eventually("another container of the agent to be ready", func() bool {
		agents := s.agents()
		if len(agents) != 1 || len(agents[0].Status.ContainerStatuses) != 1 {
			return false
		}
		c := agents[0].Status.ContainerStatuses[0]
		return c.ContainerID != old && c.Ready
	})
}

// agentPID returns the number of the agent's process on the node.
func (s *scenario) agentPID() string {
	s.t.Helper()
	_, id, _ := strings.Cut(s.agentContainer(), "://")
	for line := range strings.Lines(s.onNode("ctr", "-n", "k8s.io", "tasks", "list")) {
		if fields := strings.Fields(line); fields[0] == id {
			return fields[1]
		}
	}
	require.Fail(s.t, "the agent's container has no process on the node", id)
	return ""
}
