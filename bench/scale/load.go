package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podidentity/nmi/deploy/testbed"
)

const (
	tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"

	// The server has one core for itself, the clients the other.
	serverCore, clientCore = 0, 1

	connections = 8 // of each pod
)

// result is what the pods saw of one load.
type result struct {
	perSecond float64
	p50, p99  time.Duration // of the slowest pod
}

// measureLoad starts the agent on a core of its own and puts it under load.
func measureLoad(ctx context.Context, w *testbed.World, pods []*testbed.Pod, length time.Duration) (r result, err error) {
	w.IMDS.Reset()
	agent, err := testbed.StartPinnedAgent(serverCore, w.Kubeconfig)
	if err != nil {
		return result{}, err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := agent.AwaitReady(ctx); err != nil {
		return result{}, err
	}
	return load(ctx, w, pods, length)
}

// load lets the pods ask for their tokens at once, after two seconds of warming up.
// Every answer must be a cached one.
func load(ctx context.Context, w *testbed.World, pods []*testbed.Pod, length time.Duration) (result, error) {
	for _, pod := range pods {
		if err := ask(ctx, pod); err != nil {
			return result{}, fmt.Errorf("pod %s: %w", pod.Addr, err)
		}
	}
	if _, err := askAll(ctx, pods, 2*time.Second); err != nil {
		return result{}, err
	}
	r, err := askAll(ctx, pods, length)
	if n := w.IMDS.Requests(); err == nil && n != len(pods) {
		err = fmt.Errorf("IMDS was asked %d times instead of %d: these were not cached answers", n, len(pods))
	}
	return r, err
}

// ask asks for a token once.
func ask(ctx context.Context, pod *testbed.Pod) error {
	client := pod.Client(5 * time.Second)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, tokenURL, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Metadata", "true")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", resp.Status)
	}
	return nil
}

// askAll runs wrk in every pod and adds up.
func askAll(ctx context.Context, pods []*testbed.Pod, length time.Duration) (sum result, err error) {
	results := make([]result, len(pods))
	group, ctx := errgroup.WithContext(ctx)
	for i, pod := range pods {
		group.Go(func() (err error) {
			results[i], err = wrk(ctx, pod, length)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return result{}, err
	}
	for _, r := range results {
		sum.perSecond += r.perSecond
		sum.p50, sum.p99 = max(sum.p50, r.p50), max(sum.p99, r.p99)
	}
	return sum, nil
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
func parse(report string) (r result, err error) {
	for line := range strings.Lines(report) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSpace(value)
		switch {
		case name == "50%":
			r.p50, err = time.ParseDuration(value)
		case name == "99%":
			r.p99, err = time.ParseDuration(value)
		case name == "Requests/sec:":
			r.perSecond, err = strconv.ParseFloat(value, 64)
		case strings.Contains(line, "Non-2xx"), strings.Contains(line, "Socket errors"):
			err = errors.New(strings.TrimSpace(line))
		}
		if err != nil {
			return result{}, err
		}
	}
	if r.perSecond == 0 || r.p99 == 0 {
		return result{}, fmt.Errorf("wrk's report cannot be read: %s", report)
	}
	return r, nil
}
