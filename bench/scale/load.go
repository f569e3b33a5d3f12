package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/podidentity/nmi/bench/measure"
	"github.com/podidentity/nmi/deploy/testbed"
)

// The agent has one core for itself where it is under load, the generator the other.
const agentCore, generatorCore = 0, 1

// running is a load generator whose connections are open.
type running struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	output *bufio.Reader
}

// startLoad returns when all connections are open. The i-th of the load's pods is the i-th of
// pods.
func startLoad(ctx context.Context, pods []*testbed.Pod, l load) (*running, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r := &running{cmd: exec.CommandContext(ctx, "taskset", "-c", strconv.Itoa(generatorCore), self, "-generate")}
	r.cmd.Stderr = os.Stderr
	for i := range l.Pods {
		f, err := pods[i].File()
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // the generator has a copy
		r.cmd.ExtraFiles = append(r.cmd.ExtraFiles, f)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	r.output = bufio.NewReader(out)
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	if err := json.NewEncoder(r.stdin).Encode(l); err != nil {
		return nil, r.end(err)
	}
	if _, err := r.output.ReadString('\n'); err != nil {
		return nil, r.end(err)
	}
	return r, nil
}

// run lets the load begin, and returns what came of it. Without run, call end.
func (r *running) run() (got result, err error) {
	if _, err := io.WriteString(r.stdin, "begin\n"); err != nil {
		return result{}, r.end(err)
	}
	line, err := r.output.ReadBytes('\n')
	if err != nil {
		return result{}, r.end(err)
	}
	if err := json.Unmarshal(line, &got); err != nil {
		return result{}, r.end(err)
	}
	return got, r.end(nil)
}

// end closes the connections.
func (r *running) end(err error) error {
	_ = r.stdin.Close()
	waitErr := r.cmd.Wait()
	if err != nil {
		return fmt.Errorf("the load generator: %w", errors.Join(err, waitErr))
	}
	return waitErr
}

// point is one measurement of an agent under load.
type point struct {
	result
	cpu time.Duration // of the agent, for a request
}

func (p point) perSecond() float64 { return float64(p.Requests) / p.Seconds }

// measureLoad puts a load on an agent. All answers must be tokens, or 429 where mayThrottle.
func measureLoad(ctx context.Context, agent *testbed.Agent, pods []*testbed.Pod, l load) (point, error) {
	r, err := startLoad(ctx, pods, l)
	if err != nil {
		return point{}, err
	}
	before, err := measure.CPUTime(agent.PID())
	if err != nil {
		return point{}, r.end(err)
	}
	got, err := r.run()
	if err != nil {
		return point{}, err
	}
	after, err := measure.CPUTime(agent.PID())
	if err == nil && got.Failed > 0 {
		err = fmt.Errorf("%d of %d requests failed: %s", got.Failed, got.Requests, got.Error)
	}
	return point{got, (after - before) / time.Duration(max(1, got.Requests))}, err
}

// withAgent runs fn beside an agent that is ready. It has a core of its own.
func withAgent(ctx context.Context, w *testbed.World, fn func(*testbed.Agent) error, flags ...string) (err error) {
	w.IMDS.Reset()
	agent, err := testbed.StartPinnedAgent(agentCore, w.Kubeconfig, flags...)
	if err != nil {
		return err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := agent.AwaitReady(ctx); err != nil {
		return err
	}
	return fn(agent)
}

// noLimit lets the agent ask IMDS for many tokens at once.
var noLimit = []string{"--imds-token-rate=1000", "--imds-token-concurrency=100"}

const tokenPath = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://"

// url asks for a token of the pod's own identity.
func url(resource string) string { return tokenPath + resource + ".example" }

// some is a load of the first n pods with so many active connections each, for one token.
func some(n, active int) load {
	var l load
	for range n {
		l.Pods = append(l.Pods, podLoad{Active: active, Warm: url("vault"), URLs: []string{url("vault")}})
	}
	return l
}

// at is a load of that length at a rate.
func (l load) at(rate float64, length time.Duration) load {
	l.Rate, l.Length = rate, length
	return l
}
