package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podidentity/nmi/cmd/nmi/status"
	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

// statusCommand prints what the agent of the same pod knows.
func statusCommand(c *config) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the agent, its rules, where tokens come from, and what each pod gets",
		Long: `status asks the agent of this pod, over --probe-socket, and prints how it is: its
rules, the API server, IMDS, its tokens, and the pods of its node with what they get. What
needs attention comes last, with what to do.

It fails only if no agent answers; nmi probe ready is for scripts.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && strings.Contains(args[0], "/") {
				return fmt.Errorf("unexpected argument %q: nmi explain %s says why that pod gets what it gets", args[0], args[0])
			}
			return noArguments(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			snapshot, err := agentStatus(cmd.Context(), c.probeSocket)
			if err != nil {
				return err
			}
			return printStatus(cmd.OutOrStdout(), snapshot, output)
		},
	}
	addOutput(cmd.Flags(), &output)
	c.addProbeSocket(cmd.Flags())
	return cmd
}

// agentStatus asks the agent that listens on the socket.
func agentStatus(ctx context.Context, socket string) (*status.Snapshot, error) {
	var page bytes.Buffer
	switch code, err := getPage(ctx, socket, status.Page+"?format=json", &page); {
	case err != nil:
		return nil, fmt.Errorf("%w. Run this in an agent's pod: kubectl -n kube-system exec <agent's pod> -- nmi status", err)
	case code == http.StatusServiceUnavailable: // see limitStatus
		return nil, errors.New(strings.TrimSpace(page.String()))
	case code != http.StatusOK:
		return nil, fmt.Errorf("the agent that listens on %s is of another version: %s says %d", socket, status.Page, code)
	}
	snapshot := new(status.Snapshot)
	if err := json.Unmarshal(page.Bytes(), snapshot); err != nil {
		return nil, fmt.Errorf("%s: %w", status.Page, err)
	}
	return snapshot, nil
}

func printStatus(out io.Writer, snapshot *status.Snapshot, output string) error {
	if output == outputJSON {
		return writeIndented(out, snapshot)
	}
	status.Printer{Printer: terminal.New(out)}.Snapshot(snapshot)
	return nil
}
