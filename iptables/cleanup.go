package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"

	"github.com/podidentity/nmi/iptables/ebpf"
)

// cleanStale removes what earlier agents left behind, and ends connections that bypass
// this one. It runs once the rules are in place, so that pods find no gap. Failures are
// logged and retried with the next reconciliation.
func (r *Reconciler) cleanStale(ctx context.Context) {
	var flushErr error
	if r.cfg.Mode != None {
		var flushed int
		if flushed, flushErr = flushStaleFlows(r.cfg.Metadata); flushed > 0 {
			r.counts.staleFlows.Add(uint64(flushed))
			r.cfg.Logger.InfoContext(ctx, "ended connections to the metadata service that bypassed the agent", "connections", flushed)
		}
	}
	// An NMI that used the other backend may have left chains there. Its redirect would
	// send pods to another port or address.
	others := slices.Clone(ownChains)
	if r.cfg.Mode == None {
		others = slices.DeleteFunc(others, func(c chain) bool { return c.part == partRedirect })
	}
	if r.cfg.Mode != None && r.cfg.Mode != EBPF { // programs of another agent would redirect past the rules
		removed, err := ebpf.Cleanup(r.cfg.Programs.Pins)
		if flushErr = errors.Join(flushErr, err); removed {
			r.cfg.Logger.InfoContext(ctx, "removed the programs of an agent in mode ebpf")
		}
	}
	inOther, otherErr := removeFrom(ctx, r.backend().other(), others)
	inOwn, ownErr := removeFrom(ctx, r.backend(), staleChains(r.cfg))
	if inOther || inOwn {
		r.cfg.Logger.InfoContext(ctx, "removed stale chains of another agent")
	}
	if err := errors.Join(flushErr, otherErr, ownErr); err != nil {
		if r.cfg.Mode == EBPF && err.Error() == r.lastClean { // as long as the node forbids rules
			return
		}
		r.lastClean = err.Error()
		r.cfg.Logger.WarnContext(ctx, "cleaning up after an earlier agent failed; retrying", "error", err)
		return
	}
	r.cleaned = true
}

// staleChains are the chains that an agent with other flags may have left in the same
// backend. The redirect is not among them: in mode None one from before stays.
func staleChains(cfg Config) (chains []chain) {
	if !cfg.BlockWireserver {
		chains = append(chains, wireserverChain)
	}
	switch cfg.Mode {
	case None:
		chains = append(chains, inputChain) // it would drop what others redirect
	case EBPF:
		chains = append(chains, inputChain, redirectChain)
	}
	return chains
}

// removeFrom removes chains and the jumps to them from a backend, and reports whether
// there were any. A backend that is not installed is clean. A chain that a rule of
// another program refers to is emptied, and is an error.
func removeFrom(ctx context.Context, backend Backend, chains []chain) (removed bool, err error) {
	chains = slices.DeleteFunc(slices.Clone(chains), func(c chain) bool { return !backend.has(c.table) })
	if _, err := backend.path(); err != nil || len(chains) == 0 {
		return false, nil //nolint:nilerr // nothing can have been written without the commands
	}
	run, err := newRunner(backend, new(atomic.Uint64))
	if err != nil {
		return false, err
	}
	var all error
	for _, c := range chains {
		s, err := run.read(c)
		if err != nil {
			all = errors.Join(all, err)
			continue
		}
		changes := s.remove()
		removed = removed || len(changes) > 0
		for _, change := range changes {
			if err := run.apply(ctx, change); err != nil {
				all = errors.Join(all, fmt.Errorf("removing own chains from iptables-%s: %w", backend, err))
				break
			}
		}
	}
	return removed, all
}

// Cleanup removes the agent's programs, its chains and the jumps to them, from both backends,
// its routing rules, and its addresses from lo, whatever configuration they are from. Finding
// nothing is success. It uses Address, for an address without the agent's label,
// Programs.Pins and Logger alone.
//
// The redirect goes first and the fences last: pods are refused until the end. Then they
// reach the metadata service, and with it the node's identity.
func Cleanup(ctx context.Context, cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if missing := missingCapabilities(); len(missing) > 0 {
		return permissionAdvice(missing)
	}
	var noCommands error
	if len(installed()) == 0 {
		noCommands = errNoCommands
	}
	programs, programsErr := cleanupPrograms(cfg.Programs.Pins)
	nft, nftErr := removeFrom(ctx, NFT, ownChains)
	legacy, legacyErr := removeFrom(ctx, Legacy, ownChains)
	address, addressErr := removeAddresses(cfg.Address)
	routing, routingErr := removeRoutingFence()
	if err := errors.Join(noCommands, programsErr, nftErr, legacyErr, addressErr, routingErr); err != nil {
		return err
	}
	cfg.Logger.InfoContext(ctx, "cleaned up", "programs_removed", programs, "iptables_rules_removed", nft || legacy, "routing_rules_removed", routing, "address_removed", address)
	return nil
}
