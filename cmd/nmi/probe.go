package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

const (
	probeTimeout = 2 * time.Second
	maxPage      = 16 << 20 // bytes: several times the status of a node with 250 pods
)

// probeCommand is what the kubelet runs in the agent's pod. During an
// upgrade two pods are on the node with one port between them; the socket is the
// pod's own, so that each process answers for itself.
func probeCommand(cfg *config) *cobra.Command {
	pages := map[string]string{"live": "/healthz", "ready": "/readyz"}
	probe := &cobra.Command{
		Use:   "probe [live|ready]",
		Short: "Report whether the agent of this pod is alive or ready",
		Long: `probe prints the health page of the agent that listens on --probe-socket, and fails
if the agent is not alive (live) or not ready (ready, which is the default).`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && pages[args[0]] == "" {
				return fmt.Errorf("unexpected argument %q: want one of live and ready", args[len(args)-1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			page := "/readyz"
			if len(args) == 1 {
				page = pages[args[0]]
			}
			return probe(cmd.Context(), cfg.probeSocket, page, cmd.OutOrStdout())
		},
	}
	cfg.addProbeSocket(probe.Flags())
	return probe
}

// probe prints a page of the agent that listens on the socket. Any answer but 200
// is an error.
func probe(ctx context.Context, socket, page string, out io.Writer) error {
	status, err := getPage(ctx, socket, page, out)
	if errors.Is(err, errNoAgent) {
		return fmt.Errorf("%w. Has it started, and is this its pod? Elsewhere use kubectl -n kube-system exec <agent's pod> -- nmi probe, or give the agent's --%s", err, flagProbeSocket)
	}
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("%s says %d %s", page, status, http.StatusText(status))
	}
	return nil
}

// errNoAgent means that nothing listens on the socket.
var errNoAgent = errors.New("no agent listens on")

// getPage copies a page of the agent that listens on the socket, and returns its status.
func getPage(ctx context.Context, socket, page string, out io.Writer) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nmi"+page, nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if errors.Is(err, context.DeadlineExceeded) {
		return 0, fmt.Errorf("the agent that listens on %s did not answer in %s", socket, probeTimeout)
	}
	if dial, ok := errors.AsType[*net.OpError](err); ok && dial.Op == "dial" {
		return 0, fmt.Errorf("%w %q: %w", errNoAgent, socket, errors.Unwrap(dial))
	}
	if err != nil {
		return 0, fmt.Errorf("asking the agent that listens on %s: %w", socket, err)
	}
	defer resp.Body.Close()
	_, err = io.Copy(out, io.LimitReader(resp.Body, maxPage))
	return resp.StatusCode, err
}
