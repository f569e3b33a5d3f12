package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
)

// settle deals with what was there before our rules: it comes after they are in
// place, so that no pod finds a gap. What cannot be done is logged and tried again
// at the next check; the rules are in place all the same.
func (r *Reconciler) settle(ctx context.Context) {
	var cutErr error
	if r.cfg.Mode != None {
		var cut int
		if cut, cutErr = cutBypassing(r.cfg.Metadata); cut > 0 {
			r.cut.Add(uint64(cut))
			r.cfg.Logger.Info("cut connections to the metadata service that bypassed the agent", "connections", cut)
		}
	}
	// An NMI that used the other backend left a chain there, which would send
	// pods to a port or an address of its own; an agent with --block-wireserver
	// left that behind, and one in another mode than None a rule that would drop what
	// others redirect.
	elsewhere := slices.Clone(ours)
	if r.cfg.Mode == None {
		elsewhere = slices.DeleteFunc(elsewhere, func(c chain) bool { return c.part == partRedirect })
	}
	removed, removeErr := removeFrom(ctx, r.backend().other(), elsewhere)
	stale, staleErr := removeFrom(ctx, r.backend(), unwanted(r.cfg))
	if removed || stale {
		r.cfg.Logger.Info("removed chains of another agent")
	}
	if err := errors.Join(cutErr, removeErr, staleErr); err != nil {
		r.cfg.Logger.Warn("cannot deal with what was there before; trying again", "error", err)
		return
	}
	r.settled = true
}

// unwanted are the chains of ours that the configuration does not ask for in any mode
// that it leaves open. A redirect from before stays in mode None.
func unwanted(cfg Config) (chains []chain) {
	if !cfg.BlockWireserver {
		chains = append(chains, wireserverChain)
	}
	if cfg.Mode == None {
		chains = append(chains, inputChain)
	}
	return chains
}

// removeFrom removes the jumps to the chains and then the chains from a backend,
// and reports whether there was anything. A backend that this machine has not is
// clean. A chain that somebody else still refers to stays, emptied, and is an
// error.
func removeFrom(ctx context.Context, backend Backend, chains []chain) (removed bool, err error) {
	chains = slices.DeleteFunc(slices.Clone(chains), func(c chain) bool { return !backend.has(c.table) })
	if _, err := backend.path(); err != nil || len(chains) == 0 {
		return false, nil //nolint:nilerr // what cannot be reached from here was not put there from here
	}
	k, err := openKernel(backend, new(atomic.Uint64))
	if err != nil {
		return false, err
	}
	var all error
	for _, c := range chains {
		s, err := k.read(c)
		if err != nil {
			all = errors.Join(all, err)
			continue
		}
		changes := s.remove()
		removed = removed || len(changes) > 0
		for _, change := range changes {
			if err := k.apply(ctx, change); err != nil {
				all = errors.Join(all, fmt.Errorf("removing what is ours from iptables-%s: %w", backend, err))
				break
			}
		}
	}
	return removed, all
}

// Cleanup removes our chains and the jumps to them, from both backends, the routing
// rules, and the address from lo. Finding nothing is success. Of the configuration it
// needs Address and Logger alone.
//
// The redirect goes first and the fences last: until the end, pods are refused. Then
// they reach the metadata service, and with it the node's identity.
func Cleanup(ctx context.Context, cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if missing := missingCapabilities(); len(missing) > 0 {
		return permissionAdvice(missing)
	}
	var missing error
	if len(installed()) == 0 {
		missing = errNoCommands
	}
	nft, nftErr := removeFrom(ctx, NFT, ours)
	legacy, legacyErr := removeFrom(ctx, Legacy, ours)
	address, addressErr := removeAddress(cfg.Address)
	routing, routingErr := removeRoutingFence()
	if err := errors.Join(missing, nftErr, legacyErr, addressErr, routingErr); err != nil {
		return err
	}
	cfg.Logger.Info("cleaned up", "iptables_rules_removed", nft || legacy, "routing_rules_removed", routing, "address_removed", address)
	return nil
}
