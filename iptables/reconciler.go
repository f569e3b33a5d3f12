// Package iptables keeps the rules that hand pods' calls to the metadata service
// to the agent.
//
// The life of the rules:
//
//  1. The desired rules follow from the configuration alone, as text.
//  2. Run reads what the kernel has. If that is not the desired state, one
//     iptables-restore makes it so, in one transaction: there is no moment with
//     half of the rules.
//  3. It looks again every interval, since others flush tables too.
//  4. The rules stay when Run ends, however it ends. With no agent behind them a
//     pod's connection is refused; it never reaches the node's own identity.
//  5. Cleanup removes what is ours, and nothing else.
package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"
)

// DefaultAddress is the address on lo that mode DNAT leads to, unless told
// otherwise. It is link-local, beside that of the metadata service, and network
// policies can name it.
var DefaultAddress = netip.MustParseAddr("169.254.169.252")

// Config says what is redirected and where to. All but Command and Logger is
// required; Cleanup needs Address alone.
type Config struct {
	Mode     Mode
	Metadata netip.AddrPort // of the metadata service, IPv4
	Port     uint16         // that the agent listens on
	Address  netip.Addr     // on lo, for mode DNAT
	Interval time.Duration  // between two checks of the rules
	Command  string         // the iptables to use; "" means "iptables" on the PATH
	Logger   *slog.Logger   // nil means slog.Default
}

// Reconciler keeps the rules in place.
type Reconciler struct {
	cfg    Config
	kernel *kernel
	status atomic.Pointer[error] // of the last look
}

// ErrNotYet is what Installed returns before the first look at the rules.
var ErrNotYet = errors.New("the iptables rules are not in place yet")

// New checks that rules can be read here, and changes nothing. Its errors say
// what is missing: the iptables commands, privileges, or the kernel's nat table.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Command == "" {
		cfg.Command = "iptables"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	k, err := openKernel(cfg.Command)
	if err != nil {
		return nil, err
	}
	r := &Reconciler{cfg: cfg, kernel: k}
	r.status.Store(&ErrNotYet)
	return r, nil
}

// Installed returns nil when the rules were in place at the last look or have
// been put there, else why they are not.
func (r *Reconciler) Installed() error { return *r.status.Load() }

// Run keeps the rules in place until ctx ends. It leaves them there.
func (r *Reconciler) Run(ctx context.Context) {
	const soonest = time.Second
	retry := soonest
	for {
		err := r.reconcile(ctx)
		if ctx.Err() != nil {
			return
		}
		r.status.Store(&err)
		next := r.cfg.Interval
		if err != nil {
			next = min(retry, r.cfg.Interval)
			retry *= 2
			r.cfg.Logger.Error("the iptables rules are not in place; trying again", "error", err, "in", next)
		} else {
			retry = soonest
		}
		select {
		case <-time.After(next):
		case <-ctx.Done():
			return
		}
	}
}

func (r *Reconciler) reconcile(ctx context.Context) error {
	if r.cfg.Mode == DNAT {
		if err := ensureAddress(r.cfg.Address); err != nil {
			return err
		}
	}
	s, err := r.kernel.read()
	if err != nil {
		return err
	}
	change := s.install(desired(r.cfg))
	if change == "" {
		return nil
	}
	if err := r.kernel.apply(ctx, change); err != nil {
		return err
	}
	r.cfg.Logger.Info("iptables rules put in place", "chain", Chain, "mode", r.cfg.Mode, "taken_over", s.exists)
	return nil
}

// Cleanup removes the chain, the jumps to it and the address on lo. Finding
// nothing is success.
func Cleanup(ctx context.Context, cfg Config) error {
	r, err := New(cfg)
	if err != nil {
		return err
	}
	s, err := r.kernel.read()
	if err != nil {
		return err
	}
	change := s.remove()
	if change != "" {
		if err := r.kernel.apply(ctx, change); err != nil {
			return fmt.Errorf("removing the rules: %w", err)
		}
	}
	removed, err := removeAddress(cfg.Address)
	if err != nil {
		return err
	}
	r.cfg.Logger.Info("cleaned up", "rules_removed", change != "", "address_removed", removed)
	return nil
}
