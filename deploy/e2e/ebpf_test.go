//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/deploy/testbed/attack"
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
	path        string // of the agents' commands; "" for the usual one
	mounts      *testbed.Program
	agents      int
}

func (s *scenario) kubepods() *kubepods {
	s.t.Helper()
	k := &kubepods{scenario: s, mount: "/sys/fs/cgroup"}
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

// starts starts an agent in a pod of its own, with the manifest's capabilities, and does not wait for it.
func (k *kubepods) starts(flags ...string) *testbed.Agent {
	k.t.Helper()
	k.agents++
	dir := filepath.Join(k.tree, fmt.Sprintf("kubepods/burstable/podagent%d/nmi", k.agents))
	require.NoError(k.t, os.MkdirAll(dir, 0o755))
	launcher := append([]string{"nsenter"}, k.inside()...)
	if k.path != "" {
		launcher = append(launcher, "env", "PATH="+k.path)
	}
	launcher = append(launcher, "sh", "-c", "echo 0 > "+dir+`/cgroup.procs && exec setpriv --bounding-set=-all,+net_admin,+net_raw,+bpf "$@"`, "sh")
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
	ctx := k.t.Context()
	if network != nil {
		k.object("shop", name, addr, labels)
	} else {
		_, err := world.Kube.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
			Spec:       corev1.PodSpec{NodeName: testbed.NodeName, HostNetwork: true, Containers: []corev1.Container{{Name: "app", Image: "example/app"}}},
		}, metav1.CreateOptions{})
		require.NoError(k.t, err)
		k.t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", name) })
	}
	object, err := world.Kube.CoreV1().Pods("shop").Get(ctx, name, metav1.GetOptions{})
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
func (c *container) asks() (a answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var heard struct {
		Status int
		Body   string
	}
	if !assert.NoError(c.t, c.in.Encode(tokenURL+vault)) || !assert.NoError(c.t, c.out.Decode(&heard)) {
		return a
	}
	var token struct {
		Token string `json:"access_token"`
	}
	_ = json.Unmarshal([]byte(heard.Body), &token)
	return answer{status: heard.Status, body: heard.Body, subject: imdstest.Subject(token.Token)}
}

func binding(name string) map[string]string { return map[string]string{"aadpodidbinding": name} }

// Each kind of pod gets what is its own, by whatever address.
func TestEBPF(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	k.agent()
	n, m := s.network("10.244.0.11", testbed.Ptp), s.network("10.244.0.12", testbed.Routed)

	mine := k.pod("cart-0", "10.244.0.11", n, binding("cart"))
	got := mine.asks()
	require.Equal(t, 200, got.status, got.body)
	assert.Equal(t, cart.ClientID, got.subject)

	assert.Equal(t, report.ClientID, k.pod("early-0", "", m, binding("report")).asks().subject, "the API server does not know its address")
	assert.Equal(t, report.ClientID, k.pod("reuse-0", "10.244.0.99", n, binding("report")).asks().subject, "its packets come from another pod's address")
	assert.Equal(t, cart.ClientID, mine.asks().subject)
	assert.Equal(t, 400, k.pod("unbound-0", "10.244.0.13", m, nil).asks().status)
	assert.Equal(t, 503, k.container("00000000-0000-4000-8000-000000000000", m).asks().status, "no pod of the API server's")

	hash := "0123456789abcdef0123456789abcdef"
	_, err := world.Kube.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "static-node1", Labels: binding("cart"), Annotations: map[string]string{corev1.MirrorPodAnnotationKey: hash, "kubernetes.io/config.hash": hash}},
		Spec:       corev1.PodSpec{NodeName: testbed.NodeName, Containers: []corev1.Container{{Name: "app", Image: "example/app"}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = world.DeletePod(context.Background(), "shop", "static-node1") })
	assert.Equal(t, cart.ClientID, k.container(hash, m).asks().subject, "static pod")

	// Only pods: the node's own programs, and connections to the agent's port.
	conn, err := net.Dial("tcp", testbed.NodeAddress+":2579")
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		_ = conn.Close()
	}
	assert.ErrorContains(t, err, "reset")
}

func TestEBPFHostNetwork(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	bound, unbound := k.pod("host-bound", "", nil, binding("cart")), k.pod("host-unbound", "", nil, nil)
	require.Eventually(t, func() bool { return bound.asks().subject == cart.ClientID }, patience, 50*time.Millisecond)
	before := world.IMDS.Requests()
	assert.NotZero(t, unbound.asks().status)
	assert.Equal(t, before+1, world.IMDS.Requests(), "it asks IMDS itself")
	require.NoError(t, a.Kill())
	assert.Zero(t, bound.asks().status)
	assert.NotZero(t, unbound.asks().status, "the node's programs do without the agent")

	k.agent("--host-network-pods=bound")
	before = world.IMDS.Requests()
	require.Equal(t, 400, unbound.asks().status)
	assert.Equal(t, before, world.IMDS.Requests())
	assert.Equal(t, cart.ClientID, bound.asks().subject)
}

// asking asks all the time from several pods of their own until stop is called. A failed request
// counts; a token of another identity fails the test.
func (k *kubepods) asking(clients int) (asked, failed *atomic.Int64, stop func()) {
	asked, failed = new(atomic.Int64), new(atomic.Int64)
	done := make(chan struct{})
	var asking sync.WaitGroup
	for i := range clients {
		addr := fmt.Sprintf("10.244.0.%d", 21+i)
		name, want := "cart", cart.ClientID
		if i%2 == 1 {
			name, want = "report", report.ClientID
		}
		c := k.pod(fmt.Sprintf("%s-%d", name, i), addr, k.network(addr, testbed.Routed), binding(name))
		asking.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				got := c.asks()
				if asked.Add(1); got.status != 200 {
					failed.Add(1)
				} else {
					assert.Equal(k.t, want, got.subject)
				}
			}
		})
	}
	return asked, failed, func() { close(done); asking.Wait() }
}

func TestEBPFUpgrades(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	asked, failed, stop := k.asking(4)
	require.Eventually(t, func() bool { return asked.Load() > 20 }, patience, time.Millisecond)
	failed.Store(0)
	for range 20 {
		next := k.starts()
		s.says(next, "listening")
		require.NoError(t, next.AwaitReady(t.Context()))
		s.stops(a)
		a = next
	}
	stop()
	t.Logf("%d requests", asked.Load())
	assert.Zero(t, failed.Load(), "failed requests")
}

// Whenever the agent is killed, no pod gets anything but its own identity.
func TestEBPFKills(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent()
	asked, failed, stop := k.asking(4)
	for range 100 {
		time.Sleep(rand.N(300 * time.Millisecond))
		require.NoError(t, a.Kill())
		a = k.starts()
	}
	require.NoError(t, a.AwaitReady(t.Context()))
	stop()
	assert.Less(t, failed.Load(), asked.Load(), "some are served")
	t.Logf("%d requests, %d of them failed", asked.Load(), failed.Load())
}

// Mode auto takes programs where the node forbids rules, and says so.
func TestEBPFByAuto(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	a := k.agent("--redirect-mode=auto")
	_, text := a.Ready(t.Context())
	assert.NotContains(t, text, "ebpf", "rules can be written")
	s.stops(a)
	k.cleanup()
	refusing := t.TempDir()
	for _, name := range []string{"iptables-nft", "iptables-nft-restore"} {
		script := `#!/bin/sh
[ "$1" = --version ] && echo "iptables v1.8.9 (nf_tables)" && exit
echo 'iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)' >&2
exit 4
`
		require.NoError(t, os.WriteFile(filepath.Join(refusing, name), []byte(script), 0o755))
	}
	k.path = refusing + ":/usr/bin:/bin"
	a = k.agent("--redirect-mode=auto", "--iptables-backend=nft")
	_, text = a.Ready(t.Context())
	assert.Contains(t, text, "redirect mode ebpf: iptables rules cannot be written")
	_, text = page(&http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}, "127.0.0.1", metricsPort, "/metrics")
	assert.Contains(t, text, `nmi_rules_in_place{component="egress"} 1`)
	assert.Contains(t, text, `nmi_rules_in_place{component="redirect"} 1`)
	assert.NotContains(t, text, `nmi_rules_in_place{component="guard"}`, "no alert for what the mode does without")
	n := s.network("10.244.0.11", testbed.Routed)
	assert.Equal(t, cart.ClientID, k.pod("cart-0", "10.244.0.11", n, binding("cart")).asks().subject)
}

// A pod that may send raw packets, past the programs, gets no token of the node either.
func TestEBPFForgedPackets(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	k.agent()
	attacker := s.network("10.244.0.11", testbed.Ptp)
	port := uint16(20000)
	for _, first := range []attack.FirstPacket{attack.None, attack.ACK, attack.SYN} {
		port += 4
		results, err := attacker.Attack(t.Context(), attack.Config{
			First: first, Ports: []uint16{port, port + 1, port + 2, port + 3}, Patience: 1400 * time.Millisecond,
			Path: strings.TrimPrefix(tokenURL, "http://"+testbed.MetadataAddress) + vault,
		})
		require.NoError(t, err)
		for _, r := range results {
			assert.NotContains(t, r.Answer, "access_token", first)
		}
	}
}

// An agent in another mode takes over, both ways, and leaves nothing of the other mode behind.
func TestEBPFModeChange(t *testing.T) {
	s := begin(t)
	k := s.kubepods()
	rules := func() string { return s.command("iptables-save") }
	n := s.network("10.244.0.11", testbed.Routed)
	a := k.agent("--redirect-mode=dnat")
	p := k.pod("cart-0", "10.244.0.11", n, binding("cart"))
	require.Equal(t, cart.ClientID, p.asks().subject)
	require.Contains(t, rules(), "aad-metadata")
	for _, mode := range []string{"ebpf", "dnat", "ebpf"} {
		next := k.starts("--redirect-mode=" + mode)
		s.says(next, "listening")
		require.NoError(t, next.AwaitReady(t.Context()))
		s.stops(a)
		a = next
		require.Eventually(t, func() bool {
			now := rules()
			return strings.Contains(now, "aad-metadata") == (mode == "dnat") && strings.Contains(now, "nmi-input") == (mode == "dnat")
		}, patience, 50*time.Millisecond, mode)
		require.Eventually(t, func() bool { return p.asks().subject == cart.ClientID }, patience, 50*time.Millisecond, mode)
	}
}
