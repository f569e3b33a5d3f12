//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
)

// load is pods that never stop asking. Unlike http.Client it repeats nothing: a
// connection that ends where an answer was due is a failure.
type load struct {
	sent, failed atomic.Int64
	first        atomic.Pointer[string] // failure
	stop         chan struct{}
	asking       sync.WaitGroup
}

// startLoad begins with some connections that are kept alive and some that are
// made for each request.
func startLoad(p *pod, keptAlive, fresh int) *load {
	l := &load{stop: make(chan struct{})}
	for i := range keptAlive + fresh {
		l.asking.Go(func() { l.ask(p, i < keptAlive) })
	}
	return l
}

// end stops the load and returns what it counted.
func (l *load) end() (sent, failed int64, first string) {
	close(l.stop)
	l.asking.Wait()
	if f := l.first.Load(); f != nil {
		first = *f
	}
	return l.sent.Load(), l.failed.Load(), first
}

func (l *load) ask(p *pod, keepAlive bool) {
	var conn net.Conn
	var r *bufio.Reader
	for {
		select {
		case <-l.stop:
			if conn != nil {
				_ = conn.Close()
			}
			return
		default:
		}
		l.sent.Add(1)
		err := func() error {
			if conn == nil {
				var err error
				if conn, err = p.DialContext(p.t.Context(), "tcp", testbed.MetadataAddress); err != nil {
					return err
				}
				r = bufio.NewReader(conn)
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			request := strings.Replace(tokenURL+vault, "http://"+testbed.MetadataAddress, "", 1)
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\n\r\n", request); err != nil {
				return err
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				return err
			}
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("status %d", resp.StatusCode)
			}
			if resp.Close || !keepAlive {
				_ = conn.Close()
				conn = nil
			}
			return nil
		}()
		if err != nil {
			l.failed.Add(1)
			text := err.Error()
			l.first.CompareAndSwap(nil, &text)
			if conn != nil {
				_ = conn.Close()
				conn = nil
			}
		}
	}
}

// successor starts an agent beside the one that runs, and waits until it has
// taken over.
func (s *scenario) successor(flags ...string) *testbed.Agent {
	s.t.Helper()
	a := s.agentNotReady(flags...)
	s.says(a, "listening")
	require.NoError(s.t, a.AwaitReady(s.t.Context()))
	return a
}

func (s *scenario) says(a *testbed.Agent, what string) {
	s.t.Helper()
	require.Eventually(s.t, func() bool { return strings.Contains(a.Log(), what) }, 30*time.Second, 2*time.Millisecond, what)
}

func TestTwentyUpgradesUnderLoadLoseNoRequest(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	q := s.pod("report-0", "10.244.0.12", testbed.Routed, "report")
	a := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	loads := []*load{startLoad(p, 4, 2), startLoad(q, 4, 2)}
	for range 20 {
		next := s.successor()
		code, err := a.Stop()
		require.NoError(t, err)
		assert.Zero(t, code)
		a = next
	}
	for _, l := range loads {
		sent, failed, first := l.end()
		assert.Zero(t, failed, first)
		assert.Greater(t, sent, int64(1000))
		t.Logf("requests sent: %d, failed: %d", sent, failed)
	}
}

func TestASuccessorThatDiesHalfWayLeavesTheOldOneServing(t *testing.T) {
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
	// The rules are the old one's to keep again.
	flush, err := exec.CommandContext(t.Context(), "iptables", "-t", "nat", "-F", "aad-metadata").CombinedOutput()
	require.NoError(t, err, string(flush))
	require.Eventually(t, func() bool { return strings.Contains(s.nat(), "-A aad-metadata") }, 5*time.Second, 10*time.Millisecond, "repaired")
	world.IMDS.Reset() // what reached it meanwhile was the flush's doing
	// And an agent that is well takes over from it.
	s.successor()
}

func TestASuccessorThatCannotSyncTakesNothing(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	old := s.agent()
	require.Equal(t, 200, p.asks(vault).status)
	kubeconfig, err := os.ReadFile(world.Kubeconfig)
	require.NoError(t, err)
	// In the same directory, since the handover's is beside it.
	nowhere := filepath.Join(filepath.Dir(world.Kubeconfig), "nowhere.yaml")
	elsewhere := strings.Replace(string(kubeconfig), world.Admin().Host, "https://127.0.0.1:1", 1)
	require.NotEqual(t, string(kubeconfig), elsewhere)
	require.NoError(t, os.WriteFile(nowhere, []byte(elsewhere), 0o600))

	l := startLoad(p, 2, 1)
	stuck, err := testbed.StartAgent(nowhere)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		status, text := stuck.Ready(t.Context())
		return status == http.StatusServiceUnavailable && strings.Contains(text, "connection refused")
	}, 10*time.Second, 10*time.Millisecond, "its own answer, not the old one's")
	assert.Contains(t, old.Log(), "another agent is taking over")
	require.NoError(t, stuck.Kill())
	require.Eventually(t, func() bool {
		status, _ := old.Ready(t.Context())
		return status == http.StatusOK
	}, 10*time.Second, 10*time.Millisecond, "the old one answers for the node again")
	sent, failed, first := l.end()
	assert.Zero(t, failed, first)
	assert.Positive(t, sent)
}

func TestWithoutTheDirectoryASecondAgentSaysThatThePortIsTaken(t *testing.T) {
	s := begin(t)
	s.agent("--handover-dir=")
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig},
		"--node=node1", "--operation-mode=managed", "--http-probe-port=8085", "--handover-dir=")
	require.NoError(t, err)
	assert.Equal(t, 1, code)
	assert.Contains(t, lastLine(output), "port 2579 is taken")
}

// BenchmarkStart is the time from the start of the process, on a node without
// rules, until they are in place.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		a, err := testbed.StartAgent(world.Kubeconfig)
		require.NoError(b, err)
		await(b, a, "iptables rules put in place")
		b.StopTimer()
		require.NoError(b, a.Kill())
		_, _, err = testbed.RunAgent(nil, "cleanup")
		require.NoError(b, err)
		b.StartTimer()
	}
}

// BenchmarkHandover is the time from the start of a successor until it serves.
func BenchmarkHandover(b *testing.B) {
	a, err := testbed.StartAgent(world.Kubeconfig)
	require.NoError(b, err)
	require.NoError(b, a.AwaitReady(b.Context()))
	for b.Loop() {
		next, err := testbed.StartAgent(world.Kubeconfig)
		require.NoError(b, err)
		await(b, next, "listening")
		b.StopTimer()
		_, err = a.Stop()
		require.NoError(b, err)
		a = next
		b.StartTimer()
	}
	_, err = a.Stop()
	require.NoError(b, err)
	_, _, err = testbed.RunAgent(nil, "cleanup")
	require.NoError(b, err)
}

func await(b *testing.B, a *testbed.Agent, what string) {
	b.Helper()
	for range 10_000 {
		if strings.Contains(a.Log(), what) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	b.Fatal(a.Log())
}
