package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podidentity/nmi/bench/wrk"
	"github.com/podidentity/nmi/deploy/testbed"
)

const (
	tokenURL = "http://" + testbed.MetadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"

	// The server has one core for itself, the clients the other.
	serverCore, clientCore = 0, 1

	connections = 8 // of each pod
)

var tokens = wrk.Load{Core: clientCore, Connections: connections, URL: tokenURL}

// measureLoad starts the agent on a core of its own and puts it under load.
func measureLoad(ctx context.Context, w *testbed.World, pods []*testbed.Pod, length time.Duration) (r wrk.Result, err error) {
	w.IMDS.Reset()
	agent, err := testbed.StartPinnedAgent(serverCore, w.Kubeconfig)
	if err != nil {
		return wrk.Result{}, err
	}
	defer func() {
		_, stopErr := agent.Stop()
		err = errors.Join(err, stopErr)
	}()
	if err := agent.AwaitReady(ctx); err != nil {
		return wrk.Result{}, err
	}
	return load(ctx, w, pods, length)
}

// load lets the pods ask for their tokens at once, after two seconds of warming up.
// Every answer must be a cached one.
func load(ctx context.Context, w *testbed.World, pods []*testbed.Pod, length time.Duration) (wrk.Result, error) {
	for _, pod := range pods {
		if err := ask(ctx, pod); err != nil {
			return wrk.Result{}, fmt.Errorf("pod %s: %w", pod.Addr, err)
		}
	}
	if _, err := askAll(ctx, pods, 2*time.Second); err != nil {
		return wrk.Result{}, err
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

// askAll runs wrk in every pod and adds up; the percentiles are the slowest pod's.
func askAll(ctx context.Context, pods []*testbed.Pod, length time.Duration) (sum wrk.Result, err error) {
	results := make([]wrk.Result, len(pods))
	group, ctx := errgroup.WithContext(ctx)
	for i, pod := range pods {
		group.Go(func() (err error) {
			results[i], err = tokens.Run(ctx, pod, length)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return wrk.Result{}, err
	}
	for _, r := range results {
		sum.PerSecond += r.PerSecond
		sum.P50, sum.P99 = max(sum.P50, r.P50), max(sum.P99, r.P99)
	}
	return sum, nil
}
