package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// NodeName is the node's name in the API server.
const NodeName = "node1"

// Agent is the real binary, running on the node.
type Agent struct {
	*Program
	ProbeSocket string // its own
}

// agents counts those that were started.
var agents atomic.Int64

// StartAgent starts bin/nmi in managed mode with more flags, and does not wait
// for it. If an agent is running already, it takes over from that one.
func StartAgent(kubeconfig string, flags ...string) (*Agent, error) {
	return startAgent(nil, nil, kubeconfig, flags)
}

// StartAgentBinary is StartAgent with another binary, such as an older agent's.
func StartAgentBinary(path, kubeconfig string, flags ...string) (*Agent, error) {
	return startBinary(path, nil, nil, kubeconfig, flags)
}

// StartAgentIn is StartAgent of another binary, by a command that starts the one after it, with
// the same process ID.
func StartAgentIn(launcher []string, binary, kubeconfig string, flags ...string) (*Agent, error) {
	return startBinary(binary, launcher, nil, kubeconfig, flags)
}

// StartPinnedAgent is StartAgent on one core.
func StartPinnedAgent(core int, kubeconfig string, flags ...string) (*Agent, error) {
	return startAgent(pinned(core), nil, kubeconfig, flags)
}

// StartAgent is the function of that name, with the agent inside the limit and
// with more environment, see NewManifestMemoryLimit.
func (m *MemoryLimit) StartAgent(env []string, kubeconfig string, flags ...string) (*Agent, error) {
	return startAgent(m.launcher(), env, kubeconfig, flags)
}

// StartPinnedAgent is StartAgent on one core.
func (m *MemoryLimit) StartPinnedAgent(core int, env []string, kubeconfig string, flags ...string) (*Agent, error) {
	return startAgent(append(m.launcher(), pinned(core)...), env, kubeconfig, flags)
}

func pinned(core int) []string { return []string{"taskset", "-c", strconv.Itoa(core)} }

func startAgent(launcher, env []string, kubeconfig string, flags []string) (*Agent, error) {
	binary, err := AgentBinary()
	if err != nil {
		return nil, err
	}
	return startBinary(binary, launcher, env, kubeconfig, flags)
}

func startBinary(binary string, launcher, env []string, kubeconfig string, flags []string) (*Agent, error) {
	socket := filepath.Join(filepath.Dir(kubeconfig), fmt.Sprintf("probe-%d.sock", agents.Add(1)))
	command := append(launcher, binary,
		"--node="+NodeName, "--operation-mode=managed", "--http-probe-port=8085",
		"--probe-socket="+socket, "--handover-dir="+HandoverDir(kubeconfig))
	command = append(command, flags...) // of two, the last counts
	p, err := StartProgram(command[0], append([]string{"KUBECONFIG=" + kubeconfig}, env...), command[1:]...)
	if err != nil {
		return nil, err
	}
	return &Agent{Program: p, ProbeSocket: socket}, nil
}

// HandoverDir is the directory over which agents with this kubeconfig hand over.
func HandoverDir(kubeconfig string) string {
	return filepath.Join(filepath.Dir(kubeconfig), "handover")
}

// AgentBinary is the path of bin/nmi.
func AgentBinary() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", "nmi")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("the agent is not built: run make build: %w", err)
	}
	return path, nil
}

// RunAgent runs bin/nmi with a changed environment until it ends by itself, which
// must take less than a minute, and returns its exit code and all that it printed.
func RunAgent(env []string, args ...string) (code int, output string, err error) {
	binary, err := AgentBinary()
	if err != nil {
		return 0, "", err
	}
	p, err := StartProgram(binary, env, args...)
	if err != nil {
		return 0, "", err
	}
	if code, err = p.Wait(time.Minute); err != nil {
		err = errors.Join(err, p.Kill())
	}
	return code, p.Log(), err
}

// RunAgentAsNobody is RunAgent without any privilege.
func RunAgentAsNobody(args ...string) (code int, output string, err error) {
	binary, err := AgentBinary()
	if err != nil {
		return 0, "", err
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir = "/"
	const nobody = 65534
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		return 0, "", err
	}
	return cmd.ProcessState.ExitCode(), string(out), nil
}

// AwaitReady waits until the agent says that it is.
func (a *Agent) AwaitReady(ctx context.Context) error {
	err := poll(ctx, time.Minute, "the agent to be ready", func() error {
		select {
		case <-a.Done():
			return errors.New("it has ended")
		default:
		}
		if status, text := a.Ready(ctx); status != http.StatusOK {
			return errors.New(text)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w; its log:\n%s", err, a.Log())
	}
	return nil
}

// Ready is what this agent answers at /readyz on its own socket; status 0 and an
// error's text when it does not.
func (a *Agent) Ready(ctx context.Context) (status int, text string) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", a.ProbeSocket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nmi/readyz", nil)
	if err != nil {
		return 0, err.Error()
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

// Memory is the agent's resident memory now and at its highest, in bytes.
func (a *Agent) Memory() (now, peak int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.PID()))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			now = kb << 10
		case "VmHWM":
			peak = kb << 10
		}
	}
	if now == 0 {
		return 0, 0, errors.New("the agent has ended")
	}
	return now, peak, nil
}
