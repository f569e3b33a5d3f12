package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Container is where processes of a pod run: in its cgroup, and in a network namespace.
type Container struct {
	cgroup *os.File   // directory
	ns     *Namespace // nil on the host network
	dialer *exec.Cmd
	dials  *net.UnixConn // to the dialer
}

// NewContainer makes a container of the pod with a UID. Without a namespace it is on the host network.
func (k *Kubepods) NewContainer(uid string, ns *Namespace) (*Container, error) {
	dir := filepath.Join(k.tree, "kubepods/besteffort/pod"+uid+"/app")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	c := &Container{cgroup: cgroup, ns: ns}
	if err := c.startDialer(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting a pod's process: %w", err), cgroup.Close())
	}
	return c, nil
}

// Start starts a program inside.
func (c *Container) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.cgroup.Fd())
	if c.ns == nil {
		return cmd.Start()
	}
	return c.ns.Start(cmd)
}

// Close ends the container. Programs that were started must have ended.
func (c *Container) Close() error {
	err := errors.Join(c.dials.Close(), c.dialer.Process.Kill())
	_ = c.dialer.Wait() // it was killed
	return errors.Join(err, c.cgroup.Close(), os.Remove(c.cgroup.Name()))
}

// Client is Namespace.Client, of the container.
func (c *Container) Client(timeout time.Duration) *http.Client {
	return newClient(c.DialContext, timeout)
}

// dialerEnv makes a copy of the program the process of a container that dials for it: which pod
// a connection is of is decided by the process that calls connect().
const dialerEnv = "NMI_TESTBED_DIALER"

// dialerFD is the dialer's socket. Each message on it is an address, with a socket to send the
// connection to, or an error's text.
const dialerFD = 3

func (c *Container) startDialer() error {
	mine, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer theirs.Close() //nolint:errcheck // the dialer has a copy
	c.dials = mine
	c.dialer = exec.Command("/proc/self/exe")
	c.dialer.Env = append(os.Environ(), dialerEnv+"=1")
	c.dialer.Stderr = os.Stderr
	c.dialer.ExtraFiles = []*os.File{theirs}
	if err := c.Start(c.dialer); err != nil {
		return errors.Join(err, mine.Close())
	}
	return nil
}

// DialContext dials an IP address and port from inside. The connection works from anywhere.
func (c *Container) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	mine, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer mine.Close() //nolint:errcheck // nothing more is expected of it
	_, _, err = c.dials.WriteMsgUnix([]byte(address), unix.UnixRights(int(theirs.Fd())), nil)
	_ = theirs.Close()
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = mine.SetDeadline(time.Unix(1, 0)) })()
	text, conn, err := receive(mine)
	switch {
	case err != nil:
		return nil, errors.Join(err, ctx.Err())
	case conn == nil:
		return nil, errors.New(text)
	}
	defer conn.Close() //nolint:errcheck // FileConn has a copy
	return net.FileConn(conn)
}

// serveDials is the process that startDialer starts. It ends with the process that has the other
// end of its socket.
func serveDials() error {
	file := os.NewFile(dialerFD, "dials")
	conn, err := net.FileConn(file)
	if err != nil {
		return err
	}
	for {
		address, answerTo, err := receive(conn.(*net.UnixConn)) //nolint:errcheck // socketPair's are of this type
		if err != nil {
			return err
		}
		go answerDial(address, answerTo)
	}
}

func answerDial(address string, answerTo *os.File) {
	defer answerTo.Close() //nolint:errcheck // the other end notices
	const patience = time.Minute
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		_ = unix.Sendmsg(int(answerTo.Fd()), []byte(err.Error()), nil, nil, 0)
		return
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn() //nolint:errcheck // it dialled TCP
	if err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.Sendmsg(int(answerTo.Fd()), []byte("connected"), unix.UnixRights(int(fd)), nil, 0)
		})
	}
}

// receive reads one message, and the descriptor that came with it, if one did.
func receive(conn *net.UnixConn) (text string, file *os.File, err error) {
	message, rights := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(message, rights)
	switch {
	case err != nil: // n is then -1
		return "", nil, err
	case n == 0:
		return "", nil, errors.New("the process at the other end has ended")
	case oobn == 0:
		return string(message[:n]), nil, nil
	}
	control, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil {
		return "", nil, err
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil {
		return "", nil, err
	}
	return string(message[:n]), os.NewFile(uintptr(fds[0]), "received"), nil
}

// socketPair returns a socket, and its other end for another process.
func socketPair() (mine *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	file := os.NewFile(uintptr(fds[0]), "mine")
	defer file.Close() //nolint:errcheck // FileConn has a copy
	theirs = os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil //nolint:errcheck // socketpair made it
}
