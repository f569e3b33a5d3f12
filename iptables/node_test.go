package iptables_test

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
)

func TestMain(m *testing.M) { testbed.Main(m.Run) }

var backends = []iptables.Backend{iptables.NFT, iptables.Legacy}

// node is a node with one pod and a metadata service that counts requests.
type node struct {
	t       testing.TB
	backend iptables.Backend
	network *testbed.Network
	pod     *testbed.Pod
	leaks   atomic.Int32 // requests that reached the metadata service
	caller  atomic.Value // address of the last of them
}

func newNode(tb testing.TB, backend iptables.Backend, shape testbed.Shape) *node {
	tb.Helper()
	n := &node{t: tb, backend: backend}
	var err error
	n.network, err = testbed.NewNetwork()
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, n.network.Close()) })
	n.pod, err = n.network.AddPod("10.244.0.7", shape)
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, n.pod.Close()) })

	imds, err := n.network.Metadata.Listen(testbed.MetadataAddress)
	require.NoError(tb, err)
	n.serve(imds, func(from string) string {
		n.leaks.Add(1)
		n.caller.Store(from)
		return "imds"
	})
	tb.Cleanup(func() {
		assert.NoError(tb, iptables.Cleanup(context.Background(), n.config(iptables.DNAT)))
		n.iptables("-F")
		n.iptablesOn(backend, "mangle", "-F")
	})
	return n
}

// lastCaller returns the source address of the metadata service's last request.
func (n *node) lastCaller() string {
	caller, _ := n.caller.Load().(string)
	return caller
}

// addPod adds one more pod until the test ends or the returned function is called.
func (n *node) addPod(addr string, shape testbed.Shape) (pod *testbed.Pod, remove func()) {
	n.t.Helper()
	pod, err := n.network.AddPod(addr, shape)
	require.NoError(n.t, err)
	remove = sync.OnceFunc(func() { assert.NoError(n.t, pod.Close()) })
	n.t.Cleanup(remove)
	return pod, remove
}

// serve answers requests with what says returns, until the test ends or stop is called.
func (n *node) serve(ln net.Listener, says func(caller string) string) (stop func()) {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, says(caller))
	})}
	go func() { _ = srv.Serve(ln) }()
	n.t.Cleanup(func() { _ = srv.Close() })
	return func() { _ = srv.Close() }
}

func (n *node) config(mode iptables.Mode) iptables.Config {
	return iptables.Config{
		Mode: mode, Metadata: netip.MustParseAddrPort(testbed.MetadataAddress), Port: 2579,
		Address: iptables.DefaultAddress, Interval: time.Minute, Backend: n.backend,
		Logger: slog.New(slog.DiscardHandler),
	}
}

// redirect keeps rules in place until the test ends or stop is called, and returns once
// they are in place.
func (n *node) redirect(mode iptables.Mode) (stop func()) {
	n.t.Helper()
	_, stop = n.reconcile(n.config(mode))
	return stop
}

func (n *node) reconcile(cfg iptables.Config) (r *iptables.Reconciler, stop func()) {
	n.t.Helper()
	r, err := iptables.New(cfg)
	require.NoError(n.t, err)
	require.Error(n.t, r.Status().Err, "not yet")
	stop = n.start(r)
	n.eventually(func() bool { return r.Status().Err == nil }, "rules in place")
	return r, stop
}

// start runs r until the test ends or stop is called.
func (n *node) start(r *iptables.Reconciler) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	stop = func() { cancel(); running.Wait() }
	n.t.Cleanup(stop)
	return stop
}

// agent serves "agent" at the destination of a mode.
func (n *node) agent(mode iptables.Mode) (stop func()) {
	n.t.Helper()
	addr := "0.0.0.0:2579"
	if mode == iptables.DNAT {
		addr = iptables.DefaultAddress.String() + ":2579"
	}
	ln, err := net.Listen("tcp4", addr)
	require.NoError(n.t, err)
	return n.serve(ln, func(string) string { return "agent" })
}

// patience is the timeout for what must happen, also on a busy machine.
const patience = 30 * time.Second

// ask sends the pod's request to the metadata service over a new connection, and returns
// the body of the response; "" if the connection is refused.
func (n *node) ask() string { return ask(n.pod) }

func ask(pod *testbed.Pod) string { return askFor(pod, patience) }

// askFor is ask with a timeout.
func askFor(pod *testbed.Pod, patience time.Duration) string { return get(pod.Client(patience)) }

// askFromNode is ask from the node itself.
func (n *node) askFromNode() string {
	return get(&http.Client{Timeout: patience, Transport: &http.Transport{}})
}

// get sends the request of ask with a client.
func get(client *http.Client) string {
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + testbed.MetadataAddress + "/metadata/instance")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return string(body)
}

// askAllTheTime sends the pod's requests until the test ends or stop is called. Whatever
// changes meanwhile, only the agent may answer, and no SYN may be lost: the kernel sends
// it again after a second, which is the timeout of SDKs' probes.
func (n *node) askAllTheTime() (stop func()) {
	done := make(chan struct{})
	before := lostSYNs(n.t, n.pod)
	var asking sync.WaitGroup
	asking.Go(func() {
		for asked := 0; assert.Equal(n.t, "agent", n.ask(), "request %d", asked); asked++ {
			select {
			case <-done:
				return
			default:
			}
		}
	})
	stop = sync.OnceFunc(func() {
		close(done)
		asking.Wait()
		assert.LessOrEqual(n.t, lostSYNs(n.t, n.pod), before, "lost SYNs")
	})
	n.t.Cleanup(stop)
	return stop
}

// lostSYNs returns how many SYNs of the pod were sent again because nothing answered
// them. One that meets a connection which the node still has with an earlier pod of the
// same address and port is answered by a challenge ACK (RFC 5961, section 4), and sent
// again after 10 ms (tcp_rcv_synsent_state_process); it is not lost.
func lostSYNs(tb testing.TB, pod *testbed.Pod) int {
	tb.Helper()
	var again int
	require.NoError(tb, pod.Do(func() (err error) {
		again, err = tcpCounter("TCPSynRetrans")
		return err
	}))
	challenged, err := tcpCounter("TCPSYNChallenge")
	require.NoError(tb, err)
	return again - challenged
}

// tcpCounter returns a counter of this thread's network namespace.
func tcpCounter(name string) (int, error) {
	text, err := os.ReadFile("/proc/thread-self/net/netstat")
	var names []string
	for line := range strings.Lines(string(text)) { // of names, and then of values
		fields := strings.Fields(line)
		if i := slices.Index(names, name); i > 0 {
			return strconv.Atoi(fields[i])
		}
		names = fields
	}
	return 0, cmp.Or(err, errors.New("the kernel has no counter "+name))
}

// iptables runs a command on the nat table, as another program would.
func (n *node) iptables(args ...string) string {
	n.t.Helper()
	return n.iptablesOn(n.backend, "nat", args...)
}

func (n *node) iptablesOn(backend iptables.Backend, table string, args ...string) string {
	n.t.Helper()
	out, err := exec.Command("iptables-"+string(backend), append([]string{"-t", table, "--wait"}, args...)...).CombinedOutput()
	require.NoError(n.t, err, string(out))
	return string(out)
}

func (n *node) eventually(is func() bool, what string) {
	n.t.Helper()
	require.Eventually(n.t, is, patience, 5*time.Millisecond, what)
}

// inPlace reports whether the redirect's jump is the first rule of PREROUTING and the only
// jump, and the chain has one rule.
func (n *node) inPlace() bool {
	var jumps, first, rules int
	position := 0
	for line := range strings.Lines(n.iptables("-S")) {
		switch line = strings.TrimSpace(line); {
		case strings.HasPrefix(line, "-A PREROUTING"):
			position++
			if line == "-A PREROUTING -j aad-metadata" {
				jumps++
				if position == 1 {
					first++
				}
			}
		case strings.HasPrefix(line, "-A aad-metadata"):
			rules++
		}
	}
	return jumps == 1 && first == 1 && rules == 1
}

// aMoment is how long to wait for what must not happen.
const aMoment = 700 * time.Millisecond
