// Package wrk runs the load generator of that name in a pod.
package wrk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/podidentity/nmi/deploy/testbed"
)

// Load is what to ask for, and from where.
type Load struct {
	Core        int    // that wrk runs on
	Connections int    // kept alive
	URL         string // asked with the header "Metadata: true"
}

// Result is what wrk says of one measurement.
type Result struct {
	PerSecond float64 // requests
	P50, P99  time.Duration
}

// Run puts the load on from the pod's namespace. Any answer that was not 200, and
// any socket error, spoils the measurement.
func (l Load) Run(ctx context.Context, pod *testbed.Pod, length time.Duration) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, length+30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "taskset", "-c", strconv.Itoa(l.Core), "wrk", "--latency",
		"-t1", fmt.Sprintf("-c%d", l.Connections), fmt.Sprintf("-d%ds", int(length.Seconds())), "-H", "Metadata: true", l.URL)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := pod.Start(cmd); err != nil {
		return Result{}, fmt.Errorf("starting wrk (Debian's package of that name): %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return Result{}, fmt.Errorf("wrk: %w: %s", err, out.String())
	}
	return parse(out.String())
}

func parse(report string) (r Result, err error) {
	for line := range strings.Lines(report) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSpace(value)
		switch {
		case name == "50%":
			r.P50, err = time.ParseDuration(value)
		case name == "99%":
			r.P99, err = time.ParseDuration(value)
		case name == "Requests/sec:":
			r.PerSecond, err = strconv.ParseFloat(value, 64)
		case strings.Contains(line, "Non-2xx"), strings.Contains(line, "Socket errors"):
			err = errors.New(strings.TrimSpace(line))
		}
		if err != nil {
			return Result{}, err
		}
	}
	if r.PerSecond == 0 || r.P99 == 0 {
		return Result{}, fmt.Errorf("wrk's report cannot be read: %s", report)
	}
	return r, nil
}
