package main

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

const connections = 32

// result is what wrk says of one measurement.
type result struct {
	perSecond float64
	p50, p99  string
}

// load lets wrk ask for the token from the pod's namespace, after a second of
// warming up.
func load(ctx context.Context, pod *testbed.Pod, length time.Duration) (result, error) {
	if _, err := wrk(ctx, pod, time.Second); err != nil {
		return result{}, err
	}
	return wrk(ctx, pod, length)
}

func wrk(ctx context.Context, pod *testbed.Pod, length time.Duration) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, length+30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "taskset", "-c", strconv.Itoa(clientCore), "wrk", "--latency",
		"-t1", fmt.Sprintf("-c%d", connections), fmt.Sprintf("-d%ds", int(length.Seconds())), "-H", "Metadata: true", tokenURL)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := pod.Start(cmd); err != nil {
		return result{}, fmt.Errorf("starting wrk (Debian's package of that name): %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return result{}, fmt.Errorf("wrk: %w: %s", err, out.String())
	}
	return parse(out.String())
}

// parse reads wrk's report. Any answer that was not 200, and any socket error,
// spoils the measurement.
func parse(report string) (result, error) {
	var r result
	for line := range strings.Lines(report) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSpace(value)
		switch {
		case name == "50%":
			r.p50 = value
		case name == "99%":
			r.p99 = value
		case name == "Requests/sec:":
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return result{}, err
			}
			r.perSecond = n
		case strings.Contains(line, "Non-2xx"), strings.Contains(line, "Socket errors"):
			return result{}, errors.New(strings.TrimSpace(line))
		}
	}
	if r.perSecond == 0 || r.p99 == "" {
		return result{}, fmt.Errorf("wrk's report cannot be read: %s", report)
	}
	return r, nil
}
