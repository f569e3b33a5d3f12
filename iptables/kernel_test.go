package iptables_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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

func TestPodsReachTheAgent(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			for _, tc := range []struct {
				shape testbed.Shape
				mode  iptables.Mode
				hears string
			}{
				{testbed.Ptp, iptables.Redirect, "agent"},
				{testbed.Ptp, iptables.DNAT, "agent"},
				{testbed.Routed, iptables.DNAT, "agent"},
				// The kernel has no address to redirect to, and drops the packet:
				// no token, but no leak either.
				{testbed.Routed, iptables.Redirect, ""},
			} {
				t.Run(fmt.Sprintf("%s, mode %s", tc.shape, tc.mode), func(t *testing.T) {
					n := newNode(t, backend, tc.shape)
					require.Equal(t, "imds", n.ask(), "without rules a pod reaches the metadata service")
					require.EqualValues(t, 1, n.leaks.Load())
					n.redirect(tc.mode)
					n.agent(tc.mode)
					assert.Equal(t, tc.hears, n.ask())
					assert.EqualValues(t, 1, n.leaks.Load())
				})
			}
		})
	}
}

func TestRulesOutliveTheAgent(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
				t.Run(string(mode), func(t *testing.T) {
					n := newNode(t, backend, testbed.Ptp)
					stopRules := n.redirect(mode)
					stopAgent := n.agent(mode)
					require.Equal(t, "agent", n.ask())
					stopRules()
					stopAgent()
					assert.Empty(t, n.ask())
					assert.True(t, n.inPlace())
					n.agent(mode)
					assert.Equal(t, "agent", n.ask(), "back without a word to iptables")
					assert.Zero(t, n.leaks.Load())
				})
			}
		})
	}
}

func TestForeignChangesAreRepaired(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			for what, change := range map[string]func(){
				"chain flushed":        func() { n.iptables("-F", "aad-metadata") },
				"jump deleted":         func() { n.iptables("-D", "PREROUTING", "-j", "aad-metadata") },
				"nat flushed":          func() { n.iptables("-F") },
				"all of nat deleted":   func() { n.iptables("-F"); n.iptables("-X") },
				"a rule above ours":    func() { n.iptables("-I", "PREROUTING", "1", "-p", "udp", "-j", "ACCEPT") },
				"our jump twice":       func() { n.iptables("-A", "PREROUTING", "-j", "aad-metadata") },
				"a narrower jump":      func() { n.iptables("-A", "PREROUTING", "-i", "veth+", "-j", "aad-metadata") },
				"a rule in our chain":  func() { n.iptables("-I", "aad-metadata", "1", "-j", "RETURN") },
				"another agent's port": func() { n.iptables("-R", "aad-metadata", "1", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "1") },
			} {
				change()
				n.eventually(func() bool { return n.inPlace() && n.ask() == "agent" }, what)
			}
		})
	}
}

func TestTheChainOfAnOldNMIIsTakenOver(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Routed)
			n.iptables("-N", "aad-metadata")
			n.iptables("-A", "aad-metadata", "-p", "tcp", "!", "-s", "127.0.0.1/32", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:2579")
			n.iptables("-A", "aad-metadata", "-j", "RETURN")
			n.iptables("-A", "PREROUTING", "-p", "udp", "-j", "ACCEPT")
			n.iptables("-I", "PREROUTING", "1", "-j", "aad-metadata")
			n.redirect(iptables.DNAT)
			n.agent(iptables.DNAT)
			assert.Equal(t, "agent", n.ask())
			assert.True(t, n.inPlace())
			assert.Contains(t, n.iptables("-S", "PREROUTING"), "-p udp", "the rules of others stay")
		})
	}
}

func TestCleanupRemovesWhatIsOursAndNothingElse(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.iptables("-N", "KUBE-SERVICES")
			n.iptables("-A", "PREROUTING", "-j", "KUBE-SERVICES")
			defer n.iptables("-X")
			defer n.iptables("-F")
			before := n.iptables("-S")
			n.redirect(iptables.DNAT)()
			require.NotEqual(t, before, n.iptables("-S"))
			require.True(t, onLo(t, iptables.DefaultAddress))
			for range 2 {
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.DNAT)))
				assert.Equal(t, before, n.iptables("-S"))
				assert.False(t, onLo(t, iptables.DefaultAddress))
			}
			assert.Equal(t, "imds", n.ask())
		})
	}
}

func TestNewSaysWhatIsMissing(t *testing.T) {
	t.Setenv("PATH", "/nowhere")
	for _, backend := range iptables.Backends {
		_, err := iptables.New(iptables.Config{Backend: backend, Logger: slog.New(slog.DiscardHandler)})
		assert.ErrorContains(t, err, "install the iptables package", backend)
	}
}

func TestTheBackendOfTheNodeIsFound(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.backend = iptables.Auto
			for name, prepare := range map[string]func(){
				"by its rules": func() { n.iptablesOf(backend, "-A", "POSTROUTING", "-j", "RETURN") },
				"by the kubelet's chain, against more rules in the other": func() {
					for range 3 {
						n.iptablesOf(other(backend), "-A", "POSTROUTING", "-j", "RETURN")
					}
					n.iptablesOf(backend, "-N", "KUBE-KUBELET-CANARY")
				},
			} {
				prepare()
				n.redirect(iptables.Redirect)()
				assert.Contains(t, n.iptablesOf(backend, "-S"), "aad-metadata", name)
				assert.NotContains(t, n.iptablesOf(other(backend), "-S"), "aad-metadata", name)
				require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))
				for _, b := range backends {
					n.iptablesOf(b, "-F")
				}
			}
			n.iptablesOf(backend, "-X")
			n.backend = backend
		})
	}
}

func TestAChainInTheOtherBackendIsRemovedOnceOursIsInPlace(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.iptablesOf(other(backend), "-N", "aad-metadata")
			n.iptablesOf(other(backend), "-A", "aad-metadata", "-p", "tcp", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:2579")
			n.iptablesOf(other(backend), "-I", "PREROUTING", "1", "-j", "aad-metadata")
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			assert.NotContains(t, n.iptablesOf(other(backend), "-S"), "aad-metadata")
			assert.Equal(t, "agent", n.ask())
			assert.Zero(t, n.leaks.Load())
		})
	}
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

func TestBesideTheRulesOfKubeProxyWhicheverComesFirst(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			defer n.iptables("-X")
			defer n.iptables("-F")
			n.kubeProxy()
			n.redirect(iptables.Redirect)
			n.agent(iptables.Redirect)
			require.True(t, n.inPlace())
			assert.Equal(t, "agent", n.ask())
			n.iptables("-F", "PREROUTING")
			n.kubeProxy() // its jump is first now, or was until a moment ago
			n.eventually(n.inPlace, "first again")
			assert.Equal(t, "agent", n.ask())
		})
	}
}

func TestALockHeldByAnotherProgramIsWaitedFor(t *testing.T) {
	n := newNode(t, iptables.Legacy, testbed.Ptp) // nft has no such lock
	lock, err := os.OpenFile("/run/xtables.lock", os.O_CREATE|os.O_RDONLY, 0o600)
	require.NoError(t, err)
	defer lock.Close()
	r, err := iptables.New(n.config(iptables.Redirect))
	require.NoError(t, err)
	require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	defer running.Wait()
	defer cancel()
	assert.Never(t, func() bool { return r.Status().Err == nil }, 2*time.Second, 50*time.Millisecond)
	require.NoError(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
	n.eventually(func() bool { return r.Status().Err == nil && n.inPlace() }, "rules in place once the lock is free")
}

// podList is what a resolver would know of the node's pods.
type podList struct {
	mu      sync.Mutex // guards both
	addrs   []netip.Addr
	changed chan struct{}
}

func (l *podList) get() ([]netip.Addr, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.addrs, l.changed
}

func (l *podList) set(addrs ...netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addrs = addrs
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

func TestAutoModeFollowsThePodsInterfaces(t *testing.T) {
	n := newNode(t, iptables.NFT, testbed.Ptp)
	n.agent(iptables.Redirect) // on all addresses
	pods := &podList{}
	cfg := n.config(iptables.AutoMode)
	cfg.Pods = pods.get
	r, err := iptables.New(cfg)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { r.Run(ctx) })
	defer running.Wait()
	defer cancel()
	becomes := func(mode iptables.Mode, why string) {
		t.Helper()
		n.eventually(func() bool {
			s := r.Status()
			return s.Err == nil && s.Mode == mode && strings.Contains(s.Why, why)
		}, why)
		assert.Equal(t, "agent", n.ask())
	}
	// A pod that asks all the time, while the mode changes under it.
	var asking sync.WaitGroup
	done := make(chan struct{})
	becomes(iptables.DNAT, "no pod's interface is known yet")
	asking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				assert.Equal(t, "agent", n.ask())
			}
		}
	})

	pods.set(n.pod.Addr)
	becomes(iptables.Redirect, "every interface that leads to a pod has an IPv4 address")

	routed, err := n.network.AddPod("10.244.0.8", testbed.Routed)
	require.NoError(t, err)
	pods.set(n.pod.Addr, routed.Addr)
	becomes(iptables.DNAT, "which leads to pod address 10.244.0.8, has no IPv4 address")

	require.NoError(t, routed.Close())
	becomes(iptables.DNAT, "pod address 10.244.0.8 is behind a gateway") // the default route's
	pods.set(n.pod.Addr)
	becomes(iptables.Redirect, "every interface")

	// An address that goes is noticed by itself.
	link, err := netlink.LinkByName("veth1")
	require.NoError(t, err)
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	require.NoError(t, err)
	require.Len(t, addrs, 1)
	close(done)
	asking.Wait() // without the address the pod has no gateway to ask through
	require.NoError(t, netlink.AddrDel(link, &addrs[0]))
	n.eventually(func() bool { return r.Status().Mode == iptables.DNAT }, "noticed that the address is gone")
	assert.Zero(t, n.leaks.Load())
}

// connection is a keep-alive connection to the metadata service.
type connection struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func connect(t *testing.T, dial func(context.Context, string, string) (net.Conn, error)) *connection {
	t.Helper()
	conn, err := dial(t.Context(), "tcp", testbed.MetadataAddress)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return &connection{t, conn, bufio.NewReader(conn)}
}

// ask sends a request over the connection and returns the answer.
func (c *connection) ask() (string, error) {
	require.NoError(c.t, c.SetDeadline(time.Now().Add(time.Second)))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: imds\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func TestConnectionsFromBeforeTheRulesAreCutAndNoOthers(t *testing.T) {
	for _, backend := range backends {
		for _, mode := range []iptables.Mode{iptables.Redirect, iptables.DNAT} {
			t.Run(fmt.Sprintf("%s, mode %s", backend, mode), func(t *testing.T) {
				n := newNode(t, backend, testbed.Ptp)
				// As on a node with kube-proxy: connections are tracked already.
				// Where they are not, there is nothing to remember.
				n.iptables("-A", "POSTROUTING", "-s", "10.255.0.0/16", "-j", "MASQUERADE")
				pods, nodes := connect(t, n.pod.DialContext), connect(t, (&net.Dialer{}).DialContext)
				for _, c := range []*connection{pods, nodes} {
					answer, err := c.ask()
					require.NoError(t, err)
					require.Equal(t, "imds", answer)
				}
				n.redirect(mode)
				n.agent(mode)
				_, err := pods.ask()
				require.Error(t, err)
				assert.EqualValues(t, 2, n.leaks.Load(), "requests at IMDS: the two from before")
				answer, err := nodes.ask()
				require.NoError(t, err)
				assert.Equal(t, "imds", answer, "the node's own connection goes on")

				// One that leads to the agent is left alone when rules are repaired.
				through := connect(t, n.pod.DialContext)
				answer, err = through.ask()
				require.NoError(t, err)
				require.Equal(t, "agent", answer)
				n.iptables("-F", "PREROUTING")
				n.eventually(n.inPlace, "repaired")
				answer, err = through.ask()
				require.NoError(t, err)
				assert.Equal(t, "agent", answer)
			})
		}
	}
}

func TestACleanupThatSomebodyElseHindersGoesAsFarAsItCan(t *testing.T) {
	for _, backend := range backends {
		t.Run(string(backend), func(t *testing.T) {
			n := newNode(t, backend, testbed.Ptp)
			n.redirect(iptables.Redirect)()
			n.iptables("-A", "OUTPUT", "-j", "aad-metadata") // somebody else's
			err := iptables.Cleanup(t.Context(), n.config(iptables.Redirect))
			require.ErrorContains(t, err, "removing what is ours from iptables-"+string(backend))
			assert.Equal(t, "imds", n.ask(), "our jump is gone, and the chain empty")
			n.iptables("-F", "OUTPUT")
			require.NoError(t, iptables.Cleanup(t.Context(), n.config(iptables.Redirect)))

			// In the other backend it is no reason not to be ready.
			n.iptablesOf(other(backend), "-N", "aad-metadata")
			n.iptablesOf(other(backend), "-A", "OUTPUT", "-j", "aad-metadata")
			n.redirect(iptables.Redirect)
			n.iptablesOf(other(backend), "-F")
			n.iptablesOf(other(backend), "-X")
		})
	}
}

func other(backend iptables.Backend) iptables.Backend {
	if backend == iptables.NFT {
		return iptables.Legacy
	}
	return iptables.NFT
}

// onLo reports whether lo has the address, for this host alone.
func onLo(t *testing.T, addr netip.Addr) bool {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	require.NoError(t, err)
	addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	require.NoError(t, err)
	for _, a := range addrs {
		if a.IP.Equal(addr.AsSlice()) {
			return true
		}
	}
	return false
}

// BenchmarkRepairBesideKubeProxy is the time in which a foreign flush is repaired beside
// 5,000 rules of kube-proxy, the commands that undo and look included: each
// iteration undoes our chain, and ends when it is noticed and repaired.
func BenchmarkRepairBesideKubeProxy(b *testing.B) {
	for _, backend := range backends {
		b.Run(string(backend), func(b *testing.B) {
			n := newNode(b, backend, testbed.Ptp)
			defer n.iptables("-X")
			defer n.iptables("-F")
			n.kubeProxy()
			n.redirect(iptables.Redirect)
			for b.Loop() {
				n.iptables("-F", "aad-metadata")
				n.eventually(n.inPlace, "repaired")
			}
		})
	}
}
