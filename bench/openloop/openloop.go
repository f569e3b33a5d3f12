// Package openloop sends requests at a fixed rate over connections that are kept alive,
// and measures each response from the moment that its request was due.
//
// A closed loop stops asking while the server stalls, and so counts one slow response
// where an application's users would have had hundreds (Gil Tene's "coordinated
// omission"). Here requests are due at fixed times. One that finds no idle connection
// waits for one, and its waiting counts.
//
// The generator is a single loop around epoll that never sleeps: Go's timers and its
// network poller wake up to a millisecond late on Linux (runtime/netpoll_epoll.go rounds
// a wait up to that), which is more than what is measured. It needs a core of its own. How
// late it sent by its own fault is reported as lag.
package openloop

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Config is what to send.
type Config struct {
	Address     string        // to dial, an IPv4 address and port
	Head        string        // of each request; sdk.ID in it becomes an ID that differs in each
	Connections int           //
	Rate        float64       // requests a second
	Warmup      time.Duration // at the same rate, not measured
	Length      time.Duration // of the measurement
}

// Result is what was measured.
type Result struct {
	Requests  int     // that were due, those of the warm-up included
	PerSecond float64 // responses in the measurement, over its length
	// Unanswered requests had no response a second after the last was due. They count
	// as if they had had it then.
	Unanswered int
	// From when a request was due to the end of its response.
	P50, P99, P999, Max time.Duration
	// From when a request was due and had a connection until it was sent.
	LagP99, LagMax time.Duration
}

// Saturated reports whether the server could not keep up, so that the latencies say how
// long the measurement was and not how fast the server is.
func (r Result) Saturated(rate float64) bool {
	return r.Unanswered > 0 || r.PerSecond < 0.99*rate
}

// Trustworthy reports whether the generator's own lag is small beside what it measured.
func (r Result) Trustworthy() bool { return r.LagP99 <= r.P99/2 }

// Run generates the load from a pod's namespace on a core. The generator is this program
// once more, which must call Main when its first argument is flag.
func (c Config) Run(ctx context.Context, pod *testbed.Pod, core int, flag string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Warmup+c.Length+30*time.Second)
	defer cancel()
	argument, err := json.Marshal(c)
	if err != nil {
		return Result{}, err
	}
	cmd := exec.CommandContext(ctx, "taskset", "-c", strconv.Itoa(core), "/proc/self/exe", flag, string(argument))
	if cmd.Args[3], err = os.Executable(); err != nil {
		return Result{}, err
	}
	var out, problems strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := pod.Start(cmd); err != nil {
		return Result{}, fmt.Errorf("starting the generator: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return Result{}, fmt.Errorf("generator: %w: %s", err, problems.String())
	}
	var r Result
	return r, json.Unmarshal([]byte(out.String()), &r)
}

// Main is the generator that Run starts; it prints a Result in JSON.
func Main(argument string) error {
	var c Config
	if err := json.Unmarshal([]byte(argument), &c); err != nil {
		return err
	}
	g, err := newGenerator(c)
	if err != nil {
		return err
	}
	defer g.close()
	if err := g.run(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(g.result())
}

// newHistogram holds nanoseconds up to a minute to three digits.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, int64(time.Minute), 3) }
