package iptables_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
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

func TestMain(m *testing.M) { testbed.Main(m) }

var backends = []iptables.Backend{iptables.NFT, iptables.Legacy}

// node is a node with one pod and a metadata service that counts its visitors.
type node struct {
	t       testing.TB
	backend iptables.Backend
	network *testbed.Network
	pod     *testbed.Pod
	leaks   atomic.Int32 // requests that reached the metadata service
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
	n.serve(imds, func() string { n.leaks.Add(1); return "imds" })
	tb.Cleanup(func() {
		assert.NoError(tb, iptables.Cleanup(context.Background(), n.config(iptables.DNAT)))
		n.iptables("-F")
	})
	return n
}

// serve answers every request with what says returns, until the test ends or the
// returned function is called.
func (n *node) serve(ln net.Listener, says func() string) (stop func()) {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, says())
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

// redirect keeps rules in place until the test ends or the returned function is
// called, and returns once they are there.
func (n *node) redirect(mode iptables.Mode) (stop func()) {
	n.t.Helper()
	r, err := iptables.New(n.config(mode))
	require.NoError(n.t, err)
	require.ErrorIs(n.t, r.Status().Err, iptables.ErrNotYet)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	stop = func() { cancel(); running.Wait() }
	n.t.Cleanup(stop)
	n.eventually(func() bool { return r.Status().Err == nil }, "rules in place")
	return stop
}

// agent answers "agent" where the mode leads to.
func (n *node) agent(mode iptables.Mode) (stop func()) {
	n.t.Helper()
	addr := "0.0.0.0:2579"
	if mode == iptables.DNAT {
		addr = iptables.DefaultAddress.String() + ":2579"
	}
	ln, err := net.Listen("tcp4", addr)
	require.NoError(n.t, err)
	return n.serve(ln, func() string { return "agent" })
}

// ask is what the pod hears when it calls the metadata service over a new
// connection; "" when it hears nothing.
func (n *node) ask() string {
	client := n.pod.Client(500 * time.Millisecond)
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + testbed.MetadataAddress + "/metadata/instance")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return string(body)
}

// iptables runs a command on the nat table, as somebody else on the node would.
func (n *node) iptables(args ...string) string {
	n.t.Helper()
	return n.iptablesOf(n.backend, args...)
}

func (n *node) iptablesOf(backend iptables.Backend, args ...string) string {
	n.t.Helper()
	out, err := exec.Command("iptables-"+string(backend), append([]string{"-t", "nat", "--wait"}, args...)...).CombinedOutput()
	require.NoError(n.t, err, string(out))
	return string(out)
}

func (n *node) eventually(is func() bool, what string) {
	n.t.Helper()
	require.Eventually(n.t, is, 10*time.Second, 5*time.Millisecond, what)
}

// inPlace reports whether the jump is the first rule of PREROUTING and the only
// one, and the chain holds one rule.
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

// kubeProxy writes rules as kube-proxy does for a thousand services: 5,000 of
// them, in chains of their own, behind a jump that it puts first.
func (n *node) kubeProxy() {
	n.t.Helper()
	var b strings.Builder
	b.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n")
	for i := range 1000 {
		fmt.Fprintf(&b, ":KUBE-SVC-%04d - [0:0]\n:KUBE-SEP-%04d - [0:0]\n", i, i)
		fmt.Fprintf(&b, "-A KUBE-SERVICES -d 10.96.%d.%d/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%04d\n", i/250, i%250+1, i)
		fmt.Fprintf(&b, "-A KUBE-SVC-%04d ! -s 10.244.0.0/16 -p tcp -j KUBE-MARK-MASQ\n-A KUBE-SVC-%04d -j KUBE-SEP-%04d\n", i, i, i)
		fmt.Fprintf(&b, "-A KUBE-SEP-%04d -s 10.244.1.%d/32 -j KUBE-MARK-MASQ\n", i, i%250+1)
		fmt.Fprintf(&b, "-A KUBE-SEP-%04d -p tcp -m tcp -j DNAT --to-destination 10.244.1.%d:8080\n", i, i%250+1)
	}
	b.WriteString("-I PREROUTING 1 -j KUBE-SERVICES\nCOMMIT\n")
	cmd := exec.Command("iptables-"+string(n.backend)+"-restore", "--noflush", "--wait=10")
	cmd.Stdin = strings.NewReader(b.String())
	out, err := cmd.CombinedOutput()
	require.NoError(n.t, err, string(out))
}
