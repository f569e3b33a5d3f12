//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// askEnv makes this program a process of a pod, see serveAsks.
const askEnv = "NMI_E2E_ASK"

// serveAsks gets the URLs that come in, each over a new connection, and writes what it hears.
func serveAsks(in io.Reader, out io.Writer) {
	urls, answers := json.NewDecoder(in), json.NewEncoder(out)
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		var url string
		if urls.Decode(&url) != nil {
			return
		}
		var heard struct {
			Status int
			Body   string
		}
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			return
		}
		req.Header.Set("Metadata", "true")
		if resp, err := client.Do(req); err != nil {
			heard.Body = err.Error()
		} else {
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			heard.Status, heard.Body = resp.StatusCode, string(body)
		}
		if answers.Encode(heard) != nil {
			return
		}
	}
}

// kubepods is the part of the cgroup hierarchy that a test's pods are in, and a mount namespace
// with a BPF file system that its agents share.
type kubepods struct {
	*scenario
	mount, tree string
	mounts      *testbed.Program
	agents      int

	// Of agents that start from now on.
	path         string // of their commands; "" for the usual one
	capabilities string
	unmounted    bool // without the BPF file system
}

// Capabilities of the manifests, as setpriv(1) has them.
const (
	capabilitiesOfRules    = "+net_admin,+net_raw"
	capabilitiesOfPrograms = capabilitiesOfRules + ",+bpf"
)

func (s *scenario) kubepods() *kubepods {
	s.t.Helper()
	k := &kubepods{scenario: s, mount: "/sys/fs/cgroup", capabilities: capabilitiesOfPrograms}
	if _, err := os.Stat(k.mount + "/cgroup.procs"); err != nil {
		k.mount = "/sys/fs/cgroup/unified"
	}
	k.tree = filepath.Join(k.mount, "nmi-e2e-"+strconv.Itoa(os.Getpid()))
	require.NoError(s.t, os.MkdirAll(k.tree+"/kubepods", 0o755))
	s.t.Cleanup(func() { removeCgroups(k.tree) })
	var err error
	k.mounts, err = testbed.StartProgram("unshare", nil, "--mount", "--propagation=private", "sh", "-c", "mount -t bpf bpf /sys/fs/bpf && echo mounted && exec sleep infinity")
	require.NoError(s.t, err)
	s.t.Cleanup(func() { assert.NoError(s.t, k.mounts.Kill()) })
	require.Eventually(s.t, func() bool { return k.mounts.Log() != "" }, patience, time.Millisecond)
	s.t.Cleanup(k.cleanup)
	return k
}

// cleanup runs nmi cleanup where the agents' programs are pinned.
func (k *kubepods) cleanup() {
	k.t.Helper()
	out, err := exec.Command("nsenter", append(k.inside(), binary(k.t), "cleanup", "--handover-dir="+testbed.HandoverDir(world.Kubeconfig))...).CombinedOutput()
	assert.NoError(k.t, err, string(out))
}

func binary(t *testing.T) string {
	t.Helper()
	path, err := testbed.AgentBinary()
	require.NoError(t, err)
	return path
}

func (k *kubepods) inside() []string {
	return []string{"--mount", "--target", strconv.Itoa(k.mounts.PID())}
}

func removeCgroups(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroups(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}

// starts starts an agent in a pod of its own, and does not wait for it.
func (k *kubepods) starts(flags ...string) *testbed.Agent {
	k.t.Helper()
	k.agents++
	dir := filepath.Join(k.tree, fmt.Sprintf("kubepods/burstable/podagent%d/nmi", k.agents))
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	var launcher []string
	if !k.unmounted {
		launcher = append([]string{"nsenter"}, k.inside()...)
	}
	if k.path != "" {
		launcher = append(launcher, "env", "PATH="+k.path)
	}
	launcher = append(launcher, "sh", "-c", "echo 0 > "+dir+`/cgroup.procs && exec setpriv --bounding-set=-all,`+k.capabilities+` "$@"`, "sh")
	a, err := testbed.StartAgentIn(launcher, binary(k.t), world.Kubeconfig, append([]string{"--redirect-mode=ebpf", "--cgroup-root=" + k.mount}, flags...)...)
	require.NoError(k.t, err)
	k.t.Cleanup(func() {
		_ = a.Kill()
		if k.t.Failed() {
			k.t.Log("the agent's log:\n" + a.Log())
		}
	})
	return a
}

func (k *kubepods) agent(flags ...string) *testbed.Agent {
	k.t.Helper()
	a := k.starts(flags...)
	require.NoError(k.t, a.AwaitReady(k.t.Context()))
	return a
}

// container is a process of a pod.
type container struct {
	t   *testing.T
	mu  sync.Mutex
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// pod makes a pod's object and a process of it; without a network it is on the host network.
func (k *kubepods) pod(name, addr string, network *pod, labels map[string]string) *container {
	k.t.Helper()
	if network != nil {
		k.object("shop", name, addr, labels)
	} else {
		k.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: corev1.PodSpec{HostNetwork: true}})
	}
	return k.containerOf("shop", name, network)
}

// create makes a pod's object in namespace shop until the test ends.
func (k *kubepods) create(p *corev1.Pod) {
	k.t.Helper()
	p.Spec.NodeName, p.Spec.Containers = testbed.NodeName, []corev1.Container{{Name: "app", Image: "example/app"}}
	_, err := world.Kube.CoreV1().Pods("shop").Create(k.t.Context(), p, metav1.CreateOptions{})
	require.NoError(k.t, err)
	k.t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", p.Name) })
}

// containerOf is container for the pod of an object.
func (k *kubepods) containerOf(namespace, name string, network *pod) *container {
	k.t.Helper()
	object, err := world.Kube.CoreV1().Pods(namespace).Get(k.t.Context(), name, metav1.GetOptions{})
	require.NoError(k.t, err)
	return k.container(string(object.UID), network)
}

// container starts a process in a pod's cgroup, and in the network namespace of one.
func (k *kubepods) container(uid string, network *pod) *container {
	k.t.Helper()
	dir := filepath.Join(k.tree, "kubepods/besteffort/pod"+uid+"/app")
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	cgroup, err := os.Open(dir)
	require.NoError(k.t, err)
	defer cgroup.Close()
	c := &container{t: k.t, cmd: exec.Command("/proc/self/exe")}
	c.cmd.Env = append(os.Environ(), askEnv+"=1")
	c.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	in, err := c.cmd.StdinPipe()
	require.NoError(k.t, err)
	out, err := c.cmd.StdoutPipe()
	require.NoError(k.t, err)
	if network != nil {
		require.NoError(k.t, network.Start(c.cmd))
	} else {
		require.NoError(k.t, c.cmd.Start())
	}
	k.t.Cleanup(func() { _ = c.cmd.Process.Kill(); _ = c.cmd.Wait() })
	c.in, c.out = json.NewEncoder(in), json.NewDecoder(out)
	return c
}

// asks sends one request for a vault token, over a new connection.
func (c *container) asks() answer { return c.get(tokenURL + vault) }

func (c *container) get(url string) (a answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var heard struct {
		Status int
		Body   string
	}
	if !assert.NoError(c.t, c.in.Encode(url)) || !assert.NoError(c.t, c.out.Decode(&heard)) {
		return a
	}
	var token struct {
		Token string `json:"access_token"`
	}
	_ = json.Unmarshal([]byte(heard.Body), &token)
	return answer{status: heard.Status, body: heard.Body, subject: imdstest.Subject(token.Token)}
}

func binding(name string) map[string]string { return map[string]string{"aadpodidbinding": name} }
