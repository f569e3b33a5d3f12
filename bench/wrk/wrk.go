// Package wrk runs the load generator of that name in pods.
//
// It is a closed loop: a connection sends its next request when it has read the last
// response. That finds the highest rate of a server; for its latency at a given rate
// see package openloop.
package wrk

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podidentity/nmi/deploy/testbed"
)

//go:embed report.lua
var script []byte

// Load is what to ask for, and how.
type Load struct {
	Core        int    // that wrk runs on
	Connections int    // of each pod, all busy
	URL         string // asked with the header "Metadata: true"
	// Head replaces the request that wrk makes of URL; "{uuid}" in it becomes an ID
	// that differs in each request. "" for none.
	Head string
	// Close asks the server to close the connection after each response, so that
	// every request needs a new one. Not with Head.
	Close bool
}

// Result is what wrk says of one measurement. The percentiles are wrk's, of a closed
// loop.
type Result struct {
	Requests       int
	PerSecond      float64 // requests
	P50, P99, P999 time.Duration
}

// Run puts the load on from a pod's namespace. Any answer that was not 200, and any
// socket error, spoils the measurement.
func (l Load) Run(ctx context.Context, pod *testbed.Pod, length time.Duration) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, length+time.Minute)
	defer cancel()
	file, err := os.CreateTemp("", "nmi-wrk-*.lua")
	if err != nil {
		return Result{}, err
	}
	defer os.Remove(file.Name())
	if _, err = file.Write(script); err != nil {
		return Result{}, err
	}
	if err = file.Close(); err != nil {
		return Result{}, err
	}
	cmd := exec.CommandContext(ctx, "taskset", l.arguments(file.Name(), length)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := pod.Start(cmd); err != nil {
		return Result{}, fmt.Errorf("starting wrk (Debian's package of that name): %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return Result{}, fmt.Errorf("wrk: %w: %s", err, out.String())
	}
	return parse(out.String())
}

func (l Load) arguments(script string, length time.Duration) []string {
	args := []string{
		"-c", strconv.Itoa(l.Core), "wrk", "-t1", fmt.Sprintf("-c%d", l.Connections),
		fmt.Sprintf("-d%ds", int(length.Seconds())), "--timeout", "30s", "-s", script, "-H", "Metadata: true",
	}
	if l.Close {
		args = append(args, "-H", "Connection: close")
	}
	args = append(args, l.URL)
	if l.Head != "" {
		args = append(args, "--", l.Head)
	}
	return args
}

// RunAll runs the load from all pods at once, and adds up. The percentiles are those
// of the slowest pod.
func (l Load) RunAll(ctx context.Context, pods []*testbed.Pod, length time.Duration) (sum Result, err error) {
	results := make([]Result, len(pods))
	group, ctx := errgroup.WithContext(ctx)
	for i, pod := range pods {
		group.Go(func() (err error) {
			results[i], err = l.Run(ctx, pod, length)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return Result{}, err
	}
	for _, r := range results {
		sum.Requests += r.Requests
		sum.PerSecond += r.PerSecond
		sum.P50, sum.P99, sum.P999 = max(sum.P50, r.P50), max(sum.P99, r.P99), max(sum.P999, r.P999)
	}
	return sum, nil
}

// parse reads the line that report.lua prints.
func parse(output string) (Result, error) {
	_, line, found := strings.Cut(output, "\nreport: ")
	if !found {
		return Result{}, fmt.Errorf("wrk printed no report: %s", output)
	}
	var r struct {
		Requests int   `json:"requests"`
		Duration int64 `json:"duration_us"`
		P50      int64 `json:"p50_us"`
		P99      int64 `json:"p99_us"`
		P999     int64 `json:"p999_us"`
		Failed   int   `json:"failed"`
	}
	if err := json.Unmarshal([]byte(strings.TrimSpace(line)), &r); err != nil {
		return Result{}, fmt.Errorf("report of wrk: %w: %s", err, line)
	}
	if r.Failed > 0 || r.Requests == 0 {
		return Result{}, fmt.Errorf("%d of %d requests failed: %s", r.Failed, r.Requests, output)
	}
	us := func(n int64) time.Duration { return time.Duration(n) * time.Microsecond }
	return Result{
		Requests: r.Requests, PerSecond: float64(r.Requests) / us(r.Duration).Seconds(),
		P50: us(r.P50), P99: us(r.P99), P999: us(r.P999),
	}, nil
}
