package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/podidentity/nmi/cmd/nmi/doctor"
	"github.com/podidentity/nmi/cmd/nmi/terminal"
	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/podresolver"
)

// doctorCommand looks for what keeps the agent from serving its pods.
func doctorCommand(c *config) *cobra.Command {
	var pre bool
	var wait time.Duration
	var output string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what keeps the agent from serving pods",
		Long: `doctor checks the agent, the node's rules and network, the metadata service, the API
server and the node, and says of each check what is wrong, and where docs/doctor.md says
what to do. It changes nothing, but for a chain that it writes and removes at once.

Run it in the agent's pod: kubectl -n kube-system exec <agent's pod> -- nmi doctor. There it
asks the agent over --probe-socket, and needs no other flag.

With --pre it makes the checks that make sense before an installation, in a pod on the host
network with the agent's capabilities, or on the node. It takes all of the agent's flags
then (nmi --help): give it those that the agent will have. Without --operation-mode it
looks for what managed mode needs.

A check succeeds (√), warns (‼), fails (×), or is skipped (-) where it cannot be made with
this process's privileges and rights. Only a check that fails makes the exit code 1.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.logger(cmd.ErrOrStderr())
			if !cmd.Flags().Changed(flagOperationMode) {
				c.resolver.Mode = podresolver.Managed // as chart and manifest say, unlike the flag's own default
			}
			cfg := doctor.Config{Pre: pre, Wait: wait, Socket: c.probeSocket, Settings: c.doctorSettings(), Ask: func(ctx context.Context, page string) (int, string, error) {
				var text bytes.Buffer
				status, err := getPage(ctx, c.probeSocket, page, &text)
				return status, text.String(), err
			}}
			cfg.API, cfg.APIErr = apiServer("nmi/" + version)
			return examine(cmd.Context(), cfg, output, cmd.OutOrStdout())
		},
	}
	agent := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.addFlags(agent)
	agent.VisitAll(func(f *pflag.Flag) { f.Hidden = f.Name != flagNode && f.Name != flagProbeSocket })
	agent.Lookup(flagNode).Usage = "name of the node; known to the agent, and useful with --pre"
	cmd.Flags().AddFlagSet(agent)
	cmd.Flags().BoolVar(&pre, "pre", false, "make the checks before an installation, without an agent")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to repeat checks that fail, such as 2m")
	addOutput(cmd.Flags(), &output)
	return cmd
}

// examine makes the checks and prints them. Its error counts those that failed.
func examine(ctx context.Context, cfg doctor.Config, output string, out io.Writer) error {
	var report doctor.Report
	if output == outputJSON {
		report = doctor.Run(ctx, cfg, doctor.Silent{})
		if err := writeIndented(out, report); err != nil {
			return err
		}
	} else {
		table := &doctor.Table{Printer: terminal.New(out)}
		report = doctor.Run(ctx, cfg, table)
		table.Summary(report)
	}
	if !report.Success {
		return fmt.Errorf("checks failed: %d", report.Count(doctor.Error))
	}
	return ctx.Err()
}

// doctorSettings are what nmi doctor needs to know of the agent's flags.
func (c *config) doctorSettings() doctor.Settings {
	rules := c.rules
	rules.Port, rules.Programs.Pins = c.front.addr.Port(), ebpf.FindPins()
	return doctor.Settings{
		Node: c.resolver.Node, Mode: c.resolver.Mode, Rules: rules, AllowUnguarded: c.links.AllowUnguarded,
		Ports: []doctor.Port{
			{Flag: c.front.flag, Addr: c.front.addr},
			{Flag: c.probes.flag, Addr: c.probes.addr, Page: "/healthz"},
			{Flag: c.metrics.flag, Addr: c.metrics.addr, Page: "/metrics"},
		},
		HandoverDir: c.handoverDir, StartupTaint: c.startupTaint,
		Federation: doctor.Federation{ServiceAccounts: c.resolver.Federation.ServiceAccounts, AsNode: c.federation.asNode},
	}
}
