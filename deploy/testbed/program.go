package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/podidentity/nmi/deploy/testlog"
)

// Program is a program of the node that runs until it is stopped. It dies with
// the process that started it.
type Program struct {
	cmd  *exec.Cmd
	log  *testlog.Buffer
	done chan struct{} // closed when it has ended
	err  error         // of Wait; set before done is closed
}

// StartProgram starts a program in the process's own namespace, with more
// environment.
func StartProgram(path string, env []string, args ...string) (*Program, error) {
	p := &Program{cmd: exec.Command(path, args...), log: &testlog.Buffer{}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := launch(p.cmd); err != nil {
		return nil, fmt.Errorf("starting %s: %w", filepath.Base(path), err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// launcher starts programs from one thread that never ends: the signal that takes
// a program with its parent is sent when the parent's thread ends (prctl(2),
// PR_SET_PDEATHSIG), and threads that enter namespaces end all the time.
var launcher = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for fn := range work {
			fn()
		}
	}()
	return work
})

func launch(cmd *exec.Cmd) error {
	started := make(chan error)
	launcher() <- func() { started <- cmd.Start() }
	return <-started
}

// Log is what the program has written so far.
func (p *Program) Log() string { return p.log.String() }

// PID is the program's process ID.
func (p *Program) PID() int { return p.cmd.Process.Pid }

// CPUTime is what the program has used of the processors so far, in user and in system
// mode, to 10 ms (proc_pid_stat(5), utime and stime).
func (p *Program) CPUTime() (time.Duration, error) { return CPUTime(strconv.Itoa(p.PID())) }

// CPUTime is Program.CPUTime of any process.
func CPUTime(pid string) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%s/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name may have blanks
	fields := strings.Fields(rest)
	const utime, stime, tick = 11, 12, 10 * time.Millisecond // USER_HZ is 100 on Linux
	if len(fields) <= stime {
		return 0, fmt.Errorf("/proc/%s/stat cannot be read", pid)
	}
	var sum int64
	for _, field := range fields[utime : stime+1] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return time.Duration(sum) * tick, nil
}

// Done is closed when the program has ended.
func (p *Program) Done() <-chan struct{} { return p.done }

// Signal sends the program a signal, and does not wait for what comes of it.
func (p *Program) Signal(signal syscall.Signal) error { return p.cmd.Process.Signal(signal) }

// Stop asks the program to end with SIGTERM and returns its exit code.
func (p *Program) Stop() (int, error) { return p.end(syscall.SIGTERM) }

// Kill ends the program with SIGKILL, and waits until it is gone.
func (p *Program) Kill() error {
	_, err := p.end(syscall.SIGKILL)
	return err
}

// Wait waits for the program to end by itself and returns its exit code.
func (p *Program) Wait(timeout time.Duration) (int, error) {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-time.After(timeout):
		return 0, fmt.Errorf("%s has not ended after %s", filepath.Base(p.cmd.Path), timeout)
	}
}

func (p *Program) end(signal syscall.Signal) (int, error) {
	select {
	case <-p.done:
	default:
		if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return 0, err
		}
	}
	return p.Wait(30 * time.Second)
}

// Root is the project's folder, found from the working directory upwards.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("not inside the project's folder")
		}
		dir = parent
	}
}
