// Command nmi is the node agent: it redirects pods' calls to Azure's instance
// metadata service to itself and serves them tokens of the managed identities
// that their pods are bound to.
//
// main.go knows signals and exit codes, flags.go writes the flags to the configurations
// of the parts, agent.go builds the parts, starts and stops them in order, and health.go
// says how they are.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is stamped by the linker, see the Makefile.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "nmi:", err)
		os.Exit(1)
	}
}

// command is the whole command line.
func command() *cobra.Command {
	cfg := newConfig()
	root := &cobra.Command{
		Use:   "nmi",
		Short: "Serve managed identity tokens to the pods of a node",
		Long: `nmi redirects what the pods of this node send to Azure's instance metadata
service (169.254.169.254:80) to itself, finds out which pod is calling, and serves
tokens of the identities that AzureIdentityBindings give to that pod.

It takes the flags of the NMI of aad-pod-identity. The API server is found through
the environment variable KUBECONFIG, or else as a pod finds it.`,
		Args:          noArguments,
		SilenceUsage:  true, // an error is one line; --help is there for more
		SilenceErrors: true, // main prints it
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cfg.version {
				return printVersion(cmd)
			}
			if err := cfg.complete(); err != nil {
				return err
			}
			return runAgent(cmd.Context(), *cfg, cfg.logger(os.Stderr))
		},
	}
	cfg.addFlags(root.Flags())
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (%s --help lists the flags and what they take)", err, cmd.CommandPath())
	})

	root.AddCommand(cleanupCommand(cfg), doctorCommand(cfg), explainCommand(cfg), migrateCommand(cfg), probeCommand(cfg), statusCommand(cfg), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE:  func(cmd *cobra.Command, _ []string) error { return printVersion(cmd) },
	}, &cobra.Command{
		Use:    "wait",
		Short:  "Do nothing until a signal: the container of deploy/cleanup.yaml that runs after cleanup",
		Hidden: true,
		Args:   noArguments,
		RunE:   func(cmd *cobra.Command, _ []string) error { <-cmd.Context().Done(); return nil },
	})
	return root
}

func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q: the commands are cleanup, doctor, explain, migrate, probe, status and version, and the values of boolean flags are written --flag=true", args[0])
	}
	return nil
}

func printVersion(cmd *cobra.Command) error {
	goVersion := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		goVersion = info.GoVersion
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "nmi %s (%s)\n", version, goVersion)
	return err
}
