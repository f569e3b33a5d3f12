// Package peer has the servers that are measured side by side: the agent, a bare
// net/http server, nginx with proxy_cache, and any other agent that takes NMI's flags.
//
// Each answers the same request at the same address, behind the same rules. One runs
// at a time: an idle one would cost nothing, but all want port 2579, and an agent that
// runs keeps the rules as it wants them.
package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Server is one of those that are compared.
type Server struct {
	Name    string // in the tables
	Version string // of what the machine has; "" for what this repository builds
	// Agent is set for the agent of this repository, whose metrics can be read.
	Agent bool
	// Optional is set for a server that not every run has, and that may be much slower
	// than the others.
	Optional bool

	start func(ctx context.Context) (*testbed.Program, error)
	undo  func() error // after its end; nil if what it leaves is in nobody's way
}

// Start starts the server on the core that its Config says. It may not answer yet.
func (s Server) Start(ctx context.Context) (*testbed.Program, error) { return s.start(ctx) }

// Stop ends what Start started. Only the agent is asked; the others have nothing to
// finish.
func (s Server) Stop(p *testbed.Program) error {
	if !s.Agent {
		return p.Kill()
	}
	_, err := p.Stop()
	if s.undo != nil {
		err = errors.Join(err, s.undo())
	}
	return err
}

// Config is what the servers need.
type Config struct {
	World *testbed.World
	Pods  *testbed.Kubepods // that the callers are in
	Core  int               // for the server
	Dir   string            // for files of the servers
	// Body is what the peers answer: a token as the agent writes it.
	Body []byte
}

// Agent returns the agent of bin/nmi in a redirect mode that uses iptables.
func (c Config) Agent(mode string) Server {
	return Server{Name: "agent, " + mode, Agent: true, start: func(ctx context.Context) (*testbed.Program, error) {
		return ready(ctx)(testbed.StartPinnedAgent(c.Core, c.World.Kubeconfig, "--redirect-mode="+mode))
	}}
}

// AgentEBPF returns the agent in mode ebpf, without rules of another mode.
func (c Config) AgentEBPF() Server {
	return Server{Name: "agent, ebpf", Agent: true, undo: func() error { return c.Pods.Cleanup() }, start: func(ctx context.Context) (*testbed.Program, error) {
		if code, output, err := testbed.RunAgent(nil, "cleanup"); err != nil || code != 0 {
			return nil, errors.Join(errors.New("nmi cleanup failed: "+output), err)
		}
		launcher, err := c.Pods.Agent(false)
		if err != nil {
			return nil, err
		}
		binary, err := testbed.AgentBinary()
		if err != nil {
			return nil, err
		}
		launcher = append([]string{"taskset", "-c", strconv.Itoa(c.Core)}, launcher...)
		return ready(ctx)(testbed.StartAgentIn(launcher, binary, c.World.Kubeconfig, "--redirect-mode=ebpf", "--cgroup-root="+c.Pods.CgroupRoot))
	}}
}

// ready waits for an agent that has been started.
func ready(ctx context.Context) func(*testbed.Agent, error) (*testbed.Program, error) {
	return func(agent *testbed.Agent, err error) (*testbed.Program, error) {
		if err != nil {
			return nil, err
		}
		if err := agent.AwaitReady(ctx); err != nil {
			return nil, errors.Join(err, agent.Kill())
		}
		return agent.Program, nil
	}
}

// behindRedirect starts a program on the server's core, behind the rules of mode
// redirect: the agent's rules stay when it ends.
func (c Config) behindRedirect(ctx context.Context, path string, args ...string) (*testbed.Program, error) {
	agent, err := c.Agent("redirect").Start(ctx)
	if err != nil {
		return nil, fmt.Errorf("writing the rules: %w", err)
	}
	if _, err := agent.Stop(); err != nil {
		return nil, fmt.Errorf("writing the rules: %w", err)
	}
	return c.pinned(nil, path, args...)
}

// pinned starts a program on the server's core. Its children die with it.
func (c Config) pinned(env []string, path string, args ...string) (*testbed.Program, error) {
	command := append([]string{"-c", strconv.Itoa(c.Core), "unshare", "--pid", "--fork", "--kill-child", path}, args...)
	return testbed.StartProgram("taskset", env, command...)
}

// CPUTime is what a program and its children have used of the processors so far, to
// 10 ms for each.
func CPUTime(p *testbed.Program) (time.Duration, error) {
	sum, err := p.CPUTime()
	if err != nil {
		return 0, err
	}
	pids := []string{strconv.Itoa(p.PID())}
	for len(pids) > 0 {
		// proc_pid_children(5); complete while no child ends.
		text, err := os.ReadFile(fmt.Sprintf("/proc/%s/task/%[1]s/children", pids[0]))
		if err != nil {
			return 0, err
		}
		pids = pids[1:]
		for _, pid := range strings.Fields(string(text)) {
			used, err := testbed.CPUTime(pid)
			if err != nil {
				return 0, err
			}
			sum += used
			pids = append(pids, pid)
		}
	}
	return sum, nil
}
