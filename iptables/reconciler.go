// Package iptables keeps the rules that hand pods' calls to the metadata service
// to the agent.
//
// The life of the rules:
//
//  1. The desired rules follow from the configuration alone, as text.
//  2. Run reads what the kernel has. If that is not the desired state, one
//     iptables-restore makes it so, in one transaction: there is no moment with
//     half of the rules.
//  3. What was there before is dealt with: the chain of an old agent in the other
//     backend, connections from before the rules.
//  4. It checks them again when the kernel announces a change of links, addresses
//     or tables, when pods come and go, and every interval.
//  5. The rules stay when Run ends, however it ends. With no agent behind them a
//     pod's connection is refused; it never reaches the node's own identity.
//  6. Cleanup removes what is ours, and nothing else.
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

// Config says what is redirected and where to. All but Pods, Backend and Logger
// is required; Cleanup needs Address alone.
type Config struct {
	Mode     Mode
	Metadata netip.AddrPort // of the metadata service, IPv4
	Port     uint16         // that the agent listens on
	Address  netip.Addr     // on lo, for mode DNAT
	Interval time.Duration  // between two checks of the rules, when nothing seems to happen
	// Pods returns the addresses of this node's pods, and a channel that is
	// closed when they have changed. AutoMode needs it.
	Pods    func() ([]netip.Addr, <-chan struct{})
	Backend Backend      // whose tables to use; "" means Auto
	Logger  *slog.Logger // nil means slog.Default
}

// Reconciler keeps the rules in place.
type Reconciler struct {
	cfg    Config
	kernel *kernel
	status atomic.Pointer[Status]

	settled bool // what others left has been dealt with; for Run alone
}

// Status is what Run found or did at its last check.
type Status struct {
	Err  error // why the rules are not in place; nil when they are
	Mode Mode  // Redirect or DNAT, once there was a check
	Why  string
}

// ErrNotYet is the error of the Status before the first check.
var ErrNotYet = errors.New("the iptables rules are not in place yet")

// New checks that rules can be read here, and changes nothing. Its errors say
// what is missing: the iptables commands, privileges, or the kernel's nat table.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Mode == AutoMode && cfg.Pods == nil {
		return nil, errors.New("mode auto needs to know the pods' addresses")
	}
	why := "it was asked for"
	if cfg.Backend == Auto || cfg.Backend == "" {
		var err error
		if cfg.Backend, why, err = detect(); err != nil {
			return nil, err
		}
	}
	k, err := openKernel(cfg.Backend)
	if err != nil {
		return nil, err
	}
	cfg.Logger.Info("iptables backend", "backend", cfg.Backend, "why", why)
	r := &Reconciler{cfg: cfg, kernel: k}
	r.status.Store(&Status{Err: ErrNotYet})
	return r, nil
}

// Status returns what the last check came to.
func (r *Reconciler) Status() Status { return *r.status.Load() }

const (
	// firstRetry is the pause after a failure; it doubles up to the interval.
	firstRetry = time.Second
	// calm is the least time between checks that changes give rise to: on a node
	// where kube-proxy writes rules all the time, one check answers for many.
	calm = 500 * time.Millisecond
)

// Run keeps the rules in place until ctx ends: it checks them when the kernel
// announces a change, when pods come and go, and every interval. It leaves them
// there.
func (r *Reconciler) Run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	w, err := newWatcher(ctx, r.cfg.Backend)
	if err != nil {
		r.cfg.Logger.Warn("changes will be noticed late", "error", err, "every", r.cfg.Interval)
	}
	defer w.close()
	defer cancel()

	retry := min(firstRetry, r.cfg.Interval)
	for {
		mode, why, podsChanged := r.mode()
		w.watched(func() bool {
			var changed bool
			changed, err = r.reconcile(ctx, mode, why)
			return !changed && err == nil
		})
		if ctx.Err() != nil {
			return
		}
		r.status.Store(&Status{Err: err, Mode: mode, Why: why})
		next := r.cfg.Interval
		if err != nil {
			next = retry
			retry = min(2*retry, r.cfg.Interval)
			r.cfg.Logger.Error("the iptables rules are not in place; trying again", "error", err, "in", next)
		} else {
			retry = min(firstRetry, r.cfg.Interval)
		}
		select {
		case <-time.After(next):
			continue
		case <-w.changed:
		case <-podsChanged:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(calm):
		case <-ctx.Done():
			return
		}
	}
}

// mode is the one to use now, why, and what to wait for before asking again.
func (r *Reconciler) mode() (Mode, string, <-chan struct{}) {
	if r.cfg.Mode != AutoMode {
		return r.cfg.Mode, "it was asked for", nil
	}
	pods, changed := r.cfg.Pods()
	mode, why := choose(pods)
	return mode, why, changed
}

// reconcile makes the kernel's state the desired one, and reports whether it had
// to change the tables for that.
func (r *Reconciler) reconcile(ctx context.Context, mode Mode, why string) (changed bool, err error) {
	if mode == DNAT {
		if err := ensureAddress(r.cfg.Address); err != nil {
			return false, err
		}
	}
	s, err := r.kernel.read()
	if err != nil {
		return false, err
	}
	if change := s.install(desired(r.cfg, mode)); change != "" {
		if err := r.kernel.apply(ctx, change); err != nil {
			return false, err
		}
		changed = true
		r.cfg.Logger.Info("iptables rules put in place", "chain", Chain, "mode", mode, "why", why, "taken_over", s.exists)
		r.settled = false
	}
	if !r.settled {
		r.settle(ctx)
	}
	return changed, nil
}

// settle deals with what was there before our rules: it comes after they are in
// place, so that no pod finds a gap. What cannot be done is logged and tried again
// at the next check; the rules are in place all the same.
func (r *Reconciler) settle(ctx context.Context) {
	cut, cutErr := cutBypassing(r.cfg.Metadata, r.cfg.Port)
	if cut > 0 {
		r.cfg.Logger.Info("cut connections to the metadata service that bypassed the agent", "connections", cut)
	}
	// An NMI that used the other backend left a chain there, which would send
	// pods to a port or an address of its own.
	other := r.cfg.Backend.other()
	removed, removeErr := removeFrom(ctx, other)
	if removed {
		r.cfg.Logger.Info("removed the chain of another agent", "chain", Chain, "backend", other)
	}
	if err := errors.Join(cutErr, removeErr); err != nil {
		r.cfg.Logger.Warn("cannot deal with what was there before; trying again", "error", err)
		return
	}
	r.settled = true
}

// removeFrom removes the jumps to our chain and then the chain from a backend, and
// reports whether there was anything. A backend that this machine has not is
// clean. A chain that somebody else still refers to stays, emptied, and is an
// error.
func removeFrom(ctx context.Context, backend Backend) (bool, error) {
	if _, err := backend.path(); err != nil || !inUse(backend) {
		return false, nil //nolint:nilerr // what cannot be reached from here was not put there from here
	}
	k, err := openKernel(backend)
	if err != nil {
		return false, err
	}
	s, err := k.read()
	if err != nil {
		return false, err
	}
	for _, change := range s.remove() {
		if err := k.apply(ctx, change); err != nil {
			return false, fmt.Errorf("removing what is ours from iptables-%s: %w", backend, err)
		}
	}
	return len(s.remove()) > 0, nil
}

// Cleanup removes the chain and the jumps to it, from both backends, and the
// address from lo. Finding nothing is success.
func Cleanup(ctx context.Context, cfg Config) error {
	r, err := New(cfg) // says what is missing, if anything is
	if err != nil {
		return err
	}
	nft, nftErr := removeFrom(ctx, NFT)
	legacy, legacyErr := removeFrom(ctx, Legacy)
	address, err := removeAddress(cfg.Address)
	if err := errors.Join(nftErr, legacyErr, err); err != nil {
		return err
	}
	r.cfg.Logger.Info("cleaned up", "rules_removed", nft || legacy, "address_removed", address)
	return nil
}
