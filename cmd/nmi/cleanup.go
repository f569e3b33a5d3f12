package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podidentity/nmi/cmd/nmi/bootguard"
	"github.com/podidentity/nmi/cmd/nmi/handover"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
)

// agentExit is how long cleanup waits for an agent that is exiting: longer than the kubelet
// lets it take, see terminationGracePeriodSeconds in deploy/manifests/daemonset.yaml.
const agentExit = 40 * time.Second

// cleanupCommand gives the node back after the agent has been uninstalled.
func cleanupCommand(cfg *config) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove the agent's rules and address from this node",
		Long: `cleanup removes, in this order, the programs of --redirect-mode=ebpf (` + ebpf.DefaultPins + `),
the redirect (the iptables chain aad-metadata), the rule of --block-wireserver (nmi-wireserver), the rules against floods (nmi-input and
nmi-antispoof), the fences (the chain nmi-guard and the policy routing rules 10, 11
and 12), and the agent's own addresses from lo; nothing else.
Chains are removed from both iptables backends, with the jumps to them. The unit of
the boot guard goes first: from --boot-guard-dir, or else from
` + strings.Join(bootguard.Dirs, " and ") + `.

What it removes it recognises by name, so that it needs none of the agent's flags but
--handover-dir, and --boot-guard-dir where that was another one.

Run it after the agent has been uninstalled. An agent that runs would write its rules
again: cleanup waits for its end, and fails after ` + agentExit.String() + `. Pods are refused until the last
fence is gone; from then on they reach the metadata service themselves, and with it
the identity of the node.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := cfg.logger(os.Stderr)
			unlock, err := handover.Lock(cmd.Context(), cfg.handoverDir, agentExit)
			if errors.Is(err, fs.ErrPermission) {
				return fmt.Errorf("cleanup needs root on the node: %w", err)
			}
			if err != nil {
				return fmt.Errorf("an agent that runs would write the rules again, uninstall it first: %w", err)
			}
			defer unlock()
			return cleanUp(cmd.Context(), cfg, log)
		},
	}
	cfg.addRedirectAddress(cmd.Flags())
	cfg.addHandoverDir(cmd.Flags())
	cfg.addBootGuardDir(cmd.Flags())
	cfg.addLogFlags(cmd.Flags())
	return cmd
}

// cleanUp removes all that it can. The boot guard goes first: a boot in between leaves the
// node without rules, as cleanup does.
func cleanUp(ctx context.Context, cfg *config, log *slog.Logger) error {
	guardErr := removeBootGuard(ctx, cfg, log)
	return errors.Join(guardErr, iptables.Cleanup(ctx, iptables.Config{Address: cfg.rules.Address, Programs: ebpf.Config{Pins: ebpf.FindPins()}, Logger: log}))
}

// removeBootGuard removes the unit from --boot-guard-dir, or else from wherever it may be.
func removeBootGuard(ctx context.Context, cfg *config, log *slog.Logger) (all error) {
	dirs, optional := []string{cfg.bootGuardDir}, false
	if cfg.bootGuardDir == "" {
		dirs, optional = bootguard.Dirs, true
	}
	for _, dir := range dirs {
		removed, err := bootguard.Remove(dir)
		if removed {
			log.InfoContext(ctx, "boot guard removed", "unit", bootguard.Unit, "directory", dir)
		}
		if !optional || !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, err)
		}
	}
	return all
}
