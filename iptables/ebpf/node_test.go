package ebpf_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables/ebpf"
)

const (
	treeEnv = "NMI_EBPF_TREE" // the tests' own part of the cgroup hierarchy
	podEnv  = "NMI_EBPF_POD"  // this process is one of a pod's
)

// TestMain moves the process to a network and a mount namespace of its own, and to a cgroup that
// looks like that of the agent's container. A process of a pod is this program, too.
func TestMain(m *testing.M) {
	if os.Getenv(podEnv) != "" {
		servePod(os.Stdin, os.Stdout)
		return
	}
	if os.Getenv(treeEnv) == "" && os.Geteuid() == 0 {
		runtime.LockOSThread() // EnterNode starts the program anew from this thread
		if err := enterTree(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	testbed.Main(func() int {
		defer leaveTree()
		return m.Run()
	})
}

// cgroupMount is where cgroup v2 is mounted.
func cgroupMount() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

const treePrefix = "nmi-ebpf-test-"

// enterTree makes the cgroups <mount>/nmi-ebpf-test-<pid>/kubepods/pod<agent>/agent, and moves the
// process to the last. What an earlier run has left is removed.
func enterTree() error {
	mount, err := cgroupMount()
	if err != nil {
		return err
	}
	stale, err := filepath.Glob(mount + "/" + treePrefix + "*")
	if err != nil {
		return err
	}
	for _, dir := range stale {
		if unix.Kill(atoi(strings.TrimPrefix(filepath.Base(dir), treePrefix)), 0) == unix.ESRCH {
			removeTree(dir)
		}
	}
	tree := filepath.Join(mount, treePrefix+strconv.Itoa(os.Getpid()))
	own := filepath.Join(tree, ownCgroup)
	if err := os.MkdirAll(own, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return fmt.Errorf("moving to the cgroup of an agent: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return os.Setenv(treeEnv, tree)
}

func atoi(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

func leaveTree() {
	tree := os.Getenv(treeEnv)
	_ = os.WriteFile(filepath.Join(filepath.Dir(tree), "cgroup.procs"), []byte("0"), 0o644)
	removeTree(tree)
}

// removeTree removes cgroups, the innermost first.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}

const (
	agentUID = "00000000-0000-4000-8000-00000000a9e7"
	uidA     = "aaaaaaaa-0000-4000-8000-000000000001"
	uidB     = "bbbbbbbb-0000-4000-8000-000000000002"
	refused  = "refused"

	ownCgroup = "kubepods/pod" + agentUID + "/agent"
)

var (
	metadata = netip.MustParseAddrPort(testbed.MetadataAddress)
	target   = netip.MustParseAddrPort("169.254.169.252:2579")
)

// node is a node with a metadata service that counts connections, and an agent that answers
// with the caller's UID.
type node struct {
	t        testing.TB
	network  *testbed.Network
	tree     string // cgroup of all that the test has, above the next
	kubepods string
	cfg      ebpf.Config
	leaks    atomic.Int32
	programs atomic.Pointer[ebpf.Programs]
}

func newNode(t testing.TB) *node { //nolint:thelper // as in all tests here
	t.Helper()
	n := &node{t: t, tree: os.Getenv(treeEnv)}
	n.kubepods = filepath.Join(n.tree, "kubepods")
	var err error
	n.network, err = testbed.NewNetwork()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, n.network.Close()) })

	pins := filepath.Join(t.TempDir(), "bpf")
	require.NoError(t, os.Mkdir(pins, 0o755))
	require.NoError(t, unix.Mount("bpf", pins, "bpf", 0, ""))
	t.Cleanup(func() { assert.NoError(t, unix.Unmount(pins, 0)) })
	n.cfg = ebpf.Config{CgroupRoot: filepath.Dir(n.tree), Pins: filepath.Join(pins, "nmi"), Metadata: metadata, Agent: target}

	lo, err := netlink.LinkByName("lo")
	require.NoError(t, err)
	addr, err := netlink.ParseAddr(target.Addr().String() + "/32")
	require.NoError(t, err)
	require.NoError(t, netlink.AddrReplace(lo, addr))

	imds, err := n.network.Metadata.Listen(testbed.MetadataAddress)
	require.NoError(t, err)
	n.serve(imds, func(net.Conn) string { n.leaks.Add(1); return "imds" })
	t.Cleanup(func() {
		_, err := ebpf.Cleanup(n.cfg.Pins)
		assert.NoError(t, err)
	})
	return n
}

// serve writes an answer to each connection and closes it; one without an answer is reset.
func (n *node) serve(ln net.Listener, answer func(net.Conn) string) (stop func()) {
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if text := answer(c); text != "" {
					_, _ = io.WriteString(c, text)
					return
				}
				_ = c.(*net.TCPConn).SetLinger(0)
			}()
		}
	}()
	stop = func() { _ = ln.Close() }
	n.t.Cleanup(stop)
	return stop
}

// ensure puts the programs in place, as an agent that starts does.
func (n *node) ensure() *ebpf.Programs {
	n.t.Helper()
	p := ebpf.New(n.cfg)
	_, err := p.Ensure()
	require.NoError(n.t, err)
	n.t.Cleanup(p.Close)
	n.programs.Store(p)
	return p
}

// listen opens the agent's listener.
func (n *node) listen() *net.TCPListener {
	n.t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(n.t.Context(), "tcp4", target.String())
	require.NoError(n.t, err)
	require.NoError(n.t, ebpf.Listen(ln.(*net.TCPListener)))
	return ln.(*net.TCPListener)
}

// agent answers each connection with its caller.
func (n *node) agent() (stop func()) {
	n.t.Helper()
	return n.serve(n.listen(), n.answer)
}

func (n *node) answer(c net.Conn) string {
	uid, err := n.programs.Load().Caller(c.(*net.TCPConn))
	if err != nil {
		n.t.Log("refused: ", err)
	}
	return uid
}

// enter moves this process, the agent, to another cgroup until the test ends.
func (n *node) enter(cgroup string) {
	n.t.Helper()
	move := func(to string) {
		require.NoError(n.t, os.MkdirAll(filepath.Join(n.tree, to), 0o755))
		require.NoError(n.t, os.WriteFile(filepath.Join(n.tree, to, "cgroup.procs"), []byte("0"), 0o644))
	}
	move(cgroup)
	n.t.Cleanup(func() { move(ownCgroup) })
}

// pod is a process in a cgroup and in a network namespace.
type pod struct {
	t    testing.TB
	dir  string // its cgroup
	ns   *testbed.Namespace
	cmd  *exec.Cmd
	in   *json.Encoder
	out  *json.Decoder
	mu   sync.Mutex
	kill func()
}

// request is what a pod's process is asked to do.
type request struct {
	How     string
	Bind    string // the socket's own address, if that matters
	Count   int
	Address string // instead of the metadata service's
	Command string
	Cgroup  string // to move to
	PID, FD int    // a socket of another process
	Timeout time.Duration
}

// response is what it got: what the other end has sent.
type response struct {
	Answer, Err string
}

// addPod starts a process in the cgroup of a container of a pod.
func (n *node) addPod(addr, cgroup string, shape testbed.Shape) *pod {
	n.t.Helper()
	p, err := n.network.AddPod(addr, shape)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { assert.NoError(n.t, p.Close()) })
	return n.start(cgroup, p.Namespace)
}

// addHostPod is addPod in the node's network namespace.
func (n *node) addHostPod(cgroup string) *pod { return n.start(cgroup, nil) }

func (n *node) start(cgroup string, ns *testbed.Namespace) *pod {
	n.t.Helper()
	p := &pod{t: n.t, dir: filepath.Join(n.tree, cgroup), ns: ns}
	require.NoError(n.t, os.MkdirAll(p.dir, 0o755))
	dir, err := os.Open(p.dir)
	require.NoError(n.t, err)
	defer dir.Close()
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Env = append(os.Environ(), podEnv+"=1")
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	in, err := p.cmd.StdinPipe()
	require.NoError(n.t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(n.t, err)
	if ns == nil {
		require.NoError(n.t, p.cmd.Start())
	} else {
		require.NoError(n.t, ns.Start(p.cmd))
	}
	p.in, p.out = json.NewEncoder(in), json.NewDecoder(bufio.NewReader(out))
	p.kill = sync.OnceFunc(func() { _ = p.cmd.Process.Kill(); _ = p.cmd.Wait(); removeTree(p.dir) })
	n.t.Cleanup(p.kill)
	return p
}

const (
	patience = 20 * time.Second
	aMoment  = 700 * time.Millisecond // for what must not happen
)

func (p *pod) do(r request) response {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.Timeout == 0 {
		r.Timeout = patience
	}
	if r.Address == "" {
		r.Address = testbed.MetadataAddress
	}
	require.NoError(p.t, p.in.Encode(r))
	var got response
	require.NoError(p.t, p.out.Decode(&got))
	if got.Err != "" {
		p.t.Logf("%s: %s", r.How, got.Err)
	}
	return got
}

// ask connects to the metadata service and returns what the other end has sent; "refused" if
// that is nothing.
func (p *pod) ask(how string) string {
	p.t.Helper()
	return p.do(request{How: how}).text()
}

// askBriefly is ask of what must not be answered.
func (p *pod) askBriefly() string {
	p.t.Helper()
	return p.do(request{How: "blocking", Timeout: aMoment}).text()
}

func (r response) text() string {
	if r.Answer == "" {
		return refused
	}
	return r.Answer
}
