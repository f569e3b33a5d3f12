// Package testbed builds a node to try the agent on, out of real parts: network
// namespaces, veth links, iptables, an API server. The kernel tests, the e2e,
// the benchmarks and the demo all start from here.
//
// The process that calls EnterNode becomes the node: it moves to a network
// namespace of its own, and with it every program that it starts. The metadata
// service and the pods are namespaces beside it. None of them has a name in the
// file system, so all of it is gone when the process ends, however it ends; the
// machine's own network is never touched.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/deploy/testbed/attack"
)

// ErrNotRoot means that namespaces cannot be made.
var ErrNotRoot = errors.New("network namespaces need root: run this as root, for example with sudo")

// nodeEnv holds the inode of the namespace that the process was moved to, so
// that a copy of it elsewhere means nothing.
const nodeEnv = "NMI_TESTBED_NODE"

// EnterNode moves the process to a fresh network namespace: it returns at once
// when that has happened already, and otherwise starts the program anew in
// place, with the same process ID, arguments and open files. Call it first in
// main or TestMain.
//
// It is also where copies of the program that Pod.Attack and Kubepods.NewContainer start do
// their work, and end.
func EnterNode() error {
	if os.Getenv(dialerEnv) != "" {
		_ = serveDials() // until the other end is gone
		os.Exit(0)
	}
	if asked, err := attack.FromEnv(); asked {
		if err != nil {
			fmt.Fprintln(os.Stderr, "attack:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	if here, err := inode(); err != nil {
		return err
	} else if os.Getenv(nodeEnv) == here {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		return netlink.LinkSetUp(lo)
	}
	// execve keeps the namespaces of the thread that calls it (unshare(2)).
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("making a network namespace: %w", err)
	}
	here, err := inode()
	if err != nil {
		return err
	}
	if err := os.Setenv(nodeEnv, here); err != nil {
		return err
	}
	return fmt.Errorf("starting anew in the namespace: %w", syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// inode names the calling thread's network namespace.
func inode() (string, error) {
	link, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return "", fmt.Errorf("which network namespace is this: %w", err)
	}
	return link, nil
}

// Main is the body of a TestMain for tests that need a node; run is the Run of its
// testing.M. Without root it fails where CI says that it is CI, and elsewhere skips
// every test, saying so.
func Main(run func() int) {
	err := EnterNode()
	switch {
	case err == nil:
		os.Exit(run())
	case errors.Is(err, ErrNotRoot) && os.Getenv("CI") == "":
		fmt.Println("SKIPPED, all tests of this package:", err)
		os.Exit(0)
	default:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Namespace is a network namespace.
type Namespace struct {
	handle netns.NsHandle
}

// NewNamespace makes an empty namespace; its lo is up. Close it when done.
func NewNamespace() (*Namespace, error) {
	ns := &Namespace{}
	err := onOwnThread(func() error {
		var err error
		if ns.handle, err = netns.New(); err != nil {
			return fmt.Errorf("making a network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		return netlink.LinkSetUp(lo)
	})
	return ns, err
}

// File is the namespace for another process, which gets it back with NamespaceOf.
func (n *Namespace) File() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(n.handle), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("copying the descriptor of a namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), "netns"), nil
}

// NamespaceOf is the namespace that a descriptor stands for.
func NamespaceOf(fd int) *Namespace { return &Namespace{handle: netns.NsHandle(fd)} }

// Close lets go of the namespace. It vanishes with its last socket and process.
func (n *Namespace) Close() error { return n.handle.Close() }

// FD is the open file of the namespace.
func (n *Namespace) FD() int { return int(n.handle) }

// Do runs fn inside the namespace, on a thread that is used for nothing else.
// What fn starts on goroutines of its own is not inside.
func (n *Namespace) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("entering a network namespace: %w", err)
		}
		return fn()
	})
}

// onOwnThread runs fn on a locked thread. The thread dies with its goroutine,
// since it is never unlocked, so that its namespace cannot leak to others.
func onOwnThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- fn()
	}()
	return <-done
}

// Listen opens a TCP listener inside. The listener works from anywhere.
func (n *Namespace) Listen(address string) (ln net.Listener, err error) {
	err = n.Do(func() error {
		ln, err = net.Listen("tcp", address)
		return err
	})
	return ln, err
}

// DialContext dials an IP address and port from inside. The connection works
// from anywhere.
func (n *Namespace) DialContext(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Start starts a program inside.
func (n *Namespace) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Client returns an HTTP client that dials from inside, keeps connections alive
// and gives up after the timeout.
func (n *Namespace) Client(timeout time.Duration) *http.Client {
	return newClient(n.DialContext, timeout)
}

func newClient(dial func(ctx context.Context, network, address string) (net.Conn, error), timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 1000}}
}

// sysctl writes a network setting of the calling thread's namespace.
func sysctl(name, value string) error {
	path := "/proc/sys/net/" + strings.ReplaceAll(name, ".", "/")
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	return nil
}
