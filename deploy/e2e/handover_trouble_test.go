//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/upstream"
)

// stuck starts a successor that finds no API server, and waits until it has been
// offered the sockets and answers probes.
func (s *scenario) stuck() *testbed.Agent {
	s.t.Helper()
	kubeconfig, err := os.ReadFile(world.Kubeconfig)
	require.NoError(s.t, err)
	// In the same directory, since the handover's is beside it.
	nowhere := filepath.Join(filepath.Dir(world.Kubeconfig), "nowhere.yaml")
	elsewhere := strings.Replace(string(kubeconfig), world.Admin().Host, "https://127.0.0.1:1", 1)
	require.NotEqual(s.t, string(kubeconfig), elsewhere)
	require.NoError(s.t, os.WriteFile(nowhere, []byte(elsewhere), 0o600))
	a, err := testbed.StartAgent(nowhere)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = a.Kill() })
	s.says(a, "another agent runs on this node")
	require.Eventually(s.t, func() bool { code, _ := s.probes(a, "live"); return code == 0 }, patience, 10*time.Millisecond)
	return a
}

// repairs flushes the rules, which somebody must then put in place again.
func (s *scenario) repairs() {
	s.t.Helper()
	flush, err := exec.CommandContext(s.t.Context(), "iptables", "-t", "nat", "-F", "aad-metadata").CombinedOutput()
	require.NoError(s.t, err, string(flush))
	require.Eventually(s.t, func() bool { return strings.Contains(s.nat(), "-A aad-metadata") }, patience, 10*time.Millisecond, "repaired")
}

func TestSuccessorKilledHalfway(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	s.agent()
	random := rand.New(rand.NewPCG(3, 4)) // the same moments in each run
	for range 20 {
		next, err := testbed.StartAgent(world.Kubeconfig)
		require.NoError(t, err)
		time.Sleep(time.Duration(random.IntN(250)) * time.Millisecond)
		require.NoError(t, next.Kill())
		got := p.asks(vault)
		require.Equal(t, cart.ClientID, got.subject, got.body)
	}
	s.repairs() // the rules are the old one's to keep again
	// And an agent that is well takes over from it.
	s.successor()
}

func TestSuccessorThatCannotSync(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	old := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	l := startLoad(p, 2, 1)
	stuck := s.stuck()
	for range 20 { // 2 s
		code, text := s.probes(old, "ready")
		require.Zero(t, code, text)
		code, text = s.probes(stuck, "ready")
		require.Equal(t, 1, code, text)
		require.Contains(t, text, "not ready")
		code, text = s.probes(stuck, "live")
		require.Zero(t, code, text)
		time.Sleep(100 * time.Millisecond)
	}
	resp, err := http.Get("http://127.0.0.1:8085/readyz")
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 200, resp.StatusCode, "over the port the one that serves answers")
	code, err := stuck.Stop()
	require.NoError(t, err)
	assert.Zero(t, code)
	assert.NotContains(t, stuck.Log(), "iptables rules put in place")
	assert.NotContains(t, stuck.Log(), "listening")
	l.losesNothing(t)
}

// TestPredecessorFails has the old agent fail at each step of a takeover, in each way. The new one
// is alone then: it keeps the rules, and nothing reaches IMDS past it meanwhile, see begin.
func TestPredecessorFails(t *testing.T) {
	for _, step := range []struct {
		name  string
		start func(*scenario, *pod) *testbed.Agent // of the new agent, up to the step
	}{
		{"while the new one syncs", func(s *scenario, _ *pod) *testbed.Agent { return s.stuck() }},
		{"while it waits for IMDS to release its duties", func(s *scenario, p *pod) *testbed.Agent {
			world.IMDS.SetLatency(3 * time.Second)
			s.t.Cleanup(func() { world.IMDS.SetLatency(imdsLatency) })
			var asking sync.WaitGroup
			s.t.Cleanup(asking.Wait)
			for i := range upstream.DefaultAtOnce { // answered by nobody, if it is killed
				asking.Go(func() { p.asks(fmt.Sprintf("https://unanswered-%d.example", i)) })
			}
			require.Eventually(s.t, func() bool { atOnce, _ := world.IMDS.Peak(); return atOnce == upstream.DefaultAtOnce }, patience, time.Millisecond)
			next := s.agentNotReady()
			s.says(next, "in sync with the API server")
			return next
		}},
		{"when it has released them", func(s *scenario, _ *pod) *testbed.Agent { return s.successor() }},
	} {
		for name, fail := range map[string]func(*scenario, *testbed.Agent){
			"killed":      func(s *scenario, old *testbed.Agent) { require.NoError(s.t, old.Kill()) },
			"told to end": func(s *scenario, old *testbed.Agent) { require.NoError(s.t, old.Signal(syscall.SIGTERM)) },
			"frozen, and killed for it": func(s *scenario, old *testbed.Agent) { // by the liveness probe
				require.NoError(s.t, old.Signal(syscall.SIGSTOP))
				code, _ := s.probes(old, "live")
				assert.Equal(s.t, 1, code)
				require.NoError(s.t, old.Kill())
			},
		} {
			t.Run(step.name+" "+name, func(t *testing.T) {
				s := begin(t)
				t.Cleanup(func() { s.nmi("cleanup") })
				p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
				old, err := testbed.StartAgent(world.Kubeconfig)
				require.NoError(t, err)
				require.NoError(t, old.AwaitReady(t.Context()))
				next := step.start(s, p)
				fail(s, old)
				s.says(next, "listening")
				s.repairs()
				select {
				case <-old.Done():
				case <-time.After(patience):
					require.Fail(t, "the old agent has not ended", old.Log())
				}
				assert.NotContains(t, next.Log(), "panic")
				if strings.Contains(next.Log(), "in sync with the API server") {
					require.NoError(t, next.AwaitReady(t.Context()))
					assert.Equal(t, cart.ClientID, p.asks(vault).subject)
				}
				require.NoError(t, next.Kill())
				assert.NotEqual(t, 200, p.asks(vault).status, "nobody is there")
			})
		}
	}
}

func TestFrozenSuccessor(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	old := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	l := startLoad(p, 2, 1)
	frozen := s.stuck()
	require.NoError(t, frozen.Signal(syscall.SIGSTOP))
	code, text := s.probes(old, "ready")
	assert.Zero(t, code, text)
	assert.True(t, strings.HasPrefix(text, "ready\n"), text)
	code, text = s.probes(frozen, "live")
	assert.Equal(t, 1, code)
	assert.Contains(t, text, "did not answer in 2s")
	time.Sleep(time.Second)
	l.losesNothing(t)
	s.repairs()
	require.NoError(t, frozen.Kill())
	s.says(old, "this one keeps serving")
	assert.Equal(t, 1, strings.Count(old.Log(), "this one keeps serving"), "one line")
	s.successor()
}

func TestThirdAgentDuringUpgrade(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	third := func(when string) {
		code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig},
			"--node=node1", "--operation-mode=managed", "--nmi-port=2580", "--http-probe-port=8086", "--prometheus-port=9091",
			"--handover-dir="+testbed.HandoverDir(world.Kubeconfig))
		require.NoError(t, err)
		assert.Equal(t, 1, code, when)
		assert.Contains(t, lastLine(output), "another agent runs on this node", when)
		assert.NotContains(t, s.nat(), "2580", when)
	}
	stuck := s.stuck()
	third("while a successor waits")
	require.NoError(t, stuck.Kill())
	s.says(a, "this one keeps serving")
	b := s.successor()
	third("while the predecessor waits")
	require.NoError(t, b.Kill())
	s.saysTimes(a, "this one keeps serving", 2)
	b = s.successor()
	s.stops(a)
	stuck = s.stuck()
	third("while a successor waits for the successor")
	require.NoError(t, b.Kill())
	s.says(stuck, "listening")
	assert.Equal(t, 503, p.asks(vault).status, "the last one serves, and knows nothing yet")
}

func TestSuccessorBeforeTheHandoverSocket(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent()
	b := s.successor()
	require.NoError(t, a.Signal(syscall.SIGSTOP)) // slow to hear that it is on its own again
	require.NoError(t, b.Kill())
	next := s.agentNotReady()
	s.says(next, "starting")
	time.Sleep(200 * time.Millisecond) // in which it finds the owner's lock taken, and waits for it
	require.NoError(t, a.Signal(syscall.SIGCONT))
	s.says(next, "listening")
	s.stops(a)
	assert.Equal(t, cart.ClientID, p.asks(vault).subject)
}

func TestNoHandoverDirectory(t *testing.T) {
	s := begin(t)
	s.agent("--handover-dir=")
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig},
		"--node=node1", "--operation-mode=managed", "--http-probe-port=8085", "--handover-dir=")
	require.NoError(t, err)
	assert.Equal(t, 1, code)
	assert.Contains(t, lastLine(output), "port 2579 is taken: another program, or an agent that does not hand over runs there")
}

// With a manifest that mounts no directory of the node, as the old NMI's.
func TestHandoverDirectoryOfTheContainer(t *testing.T) {
	s := begin(t)
	dir := t.TempDir()
	if !sameMount(t, dir, "/") {
		t.Skip("the directory for temporary files is not on the root's mount")
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1") // as in a pod
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	a := s.agent("--handover-dir=" + dir)
	assert.Equal(t, 200, p.asks(vault).status, "no reason not to serve")
	const says = "--handover-dir is in the file system of this container"
	status, text := a.Ready(t.Context())
	assert.Equal(t, 200, status)
	assert.Contains(t, text, "no agent can take over from this one: "+says)
	assert.Equal(t, 1, strings.Count(a.Log(), says), "once")
}

func sameMount(t *testing.T, a, b string) bool {
	t.Helper()
	var ids []uint64
	for _, path := range []string{a, b} {
		var s unix.Statx_t
		require.NoError(t, unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &s))
		ids = append(ids, s.Mnt_id)
	}
	return ids[0] == ids[1]
}

func TestForeignHandoverSocket(t *testing.T) {
	serve := func(network string, answer func(net.Conn)) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			t.Helper()
			ln, err := net.Listen(network, path)
			require.NoError(t, err)
			t.Cleanup(func() { _ = ln.Close() })
			go func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					answer(conn)
				}
			}()
		}
	}
	silent := func(c net.Conn) { t.Cleanup(func() { _ = c.Close() }) }
	for name, tc := range map[string]struct {
		put  func(*testing.T, string)
		says string // a warning
	}{
		"a stream socket": {serve("unix", silent), "protocol wrong type for socket"},
		"silence":         {serve("unixpacket", silent), "i/o timeout"},
		"nonsense":        {serve("unixpacket", func(c net.Conn) { _, _ = c.Write([]byte("220 ready")) }), "220 ready"},
		"nobody's socket": {serve("unixpacket", func(c net.Conn) { _ = c.Close() }), "EOF"},
		"a file":          {func(t *testing.T, path string) { t.Helper(); require.NoError(t, os.WriteFile(path, nil, 0o600)) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
			dir := t.TempDir()
			tc.put(t, filepath.Join(dir, "handover.sock"))
			a := s.agent("--handover-dir=" + dir)
			assert.Equal(t, 200, p.asks(vault).status)
			if tc.says != "" {
				s.says(a, tc.says)
				assert.Equal(t, 1, strings.Count(a.Log(), "level=WARN"))
			}
			next := s.successor("--handover-dir=" + dir)
			s.says(next, "taking over from it once in sync")
		})
	}
}

func TestUnusableHandoverDirectory(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	dir := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(dir, nil, 0o600))
	a := s.agent("--handover-dir=" + dir)
	assert.Equal(t, 200, p.asks(vault).status)
	s.says(a, "level=WARN")
	_, text := a.Ready(t.Context())
	assert.Contains(t, text, "no agent can take over from this one without refusing connections: mkdir")
	require.NoError(t, os.Remove(dir))
	require.Eventually(t, func() bool {
		_, text := a.Ready(t.Context())
		return !strings.Contains(text, "no agent can take over")
	}, 2*patience, 20*time.Millisecond) // the pauses grow
	assert.Equal(t, 1, strings.Count(a.Log(), "level=WARN"))
	next := s.successor("--handover-dir=" + dir)
	s.says(next, "taking over from it once in sync")
}
