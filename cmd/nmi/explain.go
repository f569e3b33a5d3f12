package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podidentity/nmi/podresolver"
)

const explainTimeout = 30 * time.Second

// explainCommand says what is decided for one pod, and why, by the objects of the
// cluster as they are now. It asks no agent, and can run anywhere.
func explainCommand(opts *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain <namespace>/<pod>",
		Short: "Say which identities a pod may use, and why",
		Long: `explain reads the cluster as the agent does, and says what is decided for a pod
and why: which exception applies by which label, which bindings match and which
nearly do. Of the flags below, give it those that the agent runs with.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || strings.Count(args[0], "/") != 1 {
				return errors.New("explain takes one argument: <namespace>/<pod>")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			log := opts.logger(cmd.ErrOrStderr())
			namespace, pod, _ := strings.Cut(args[0], "/")
			ctx, cancel := context.WithTimeout(cmd.Context(), explainTimeout)
			defer cancel()
			restConfig, err := apiServer("nmi/" + version)
			if err != nil {
				return err
			}
			node, err := podresolver.NodeOf(ctx, restConfig, namespace, pod)
			if err != nil {
				return err
			}
			resolving, err := opts.resolving(node)
			if err != nil {
				return err
			}
			resolving.Logger = log
			from, err := podresolver.FromAPIServer(restConfig, node)
			if err != nil {
				return err
			}
			resolver, err := podresolver.New(from, resolving)
			if err != nil {
				return err
			}
			done := make(chan struct{})
			go func() { defer close(done); resolver.Run(ctx) }()
			defer func() { cancel(); <-done }()
			select {
			case <-resolver.Synced():
			case <-ctx.Done():
				return fmt.Errorf("reading the cluster: %w", resolver.Ready())
			}
			decision, err := resolver.Explain(namespace, pod)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), decision)
			return err
		},
	}
	opts.addResolving(cmd.Flags())
	opts.addLogging(cmd.Flags())
	return cmd
}
