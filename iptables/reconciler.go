// Package iptables keeps the rules that hand pods' calls to the metadata service
// to the agent.
//
// The life of the rules:
//
//  1. The desired rules follow from the configuration and the mode alone, as text.
//  2. Run reads what the kernel has. If that is not the desired state, one
//     iptables-restore makes it so, in one transaction: there is no moment with
//     half of the rules.
//  3. What was there before is dealt with: the chain of an old agent in the other
//     backend, connections from before the rules.
//  4. It checks them again when the kernel announces a change of links, addresses
//     or tables, when pods come and go, and every interval. Each time it looks at
//     the interfaces that lead to pods: they decide the mode, and whether a source
//     address says for certain which pod is calling.
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
	"slices"
	"sync/atomic"
	"time"
)

// DefaultAddress is the address on lo that mode DNAT leads to, unless told
// otherwise. It is link-local, beside that of the metadata service, and network
// policies can name it.
var DefaultAddress = netip.MustParseAddr("169.254.169.252")

// Config says what is redirected and where to. Mode, Metadata, Port, Address and
// Interval are required; Cleanup needs Address alone.
type Config struct {
	Mode     Mode
	Metadata netip.AddrPort // of the metadata service, IPv4
	Port     uint16         // that the agent listens on
	Address  netip.Addr     // on lo, for mode DNAT
	Interval time.Duration  // between two checks of the rules, when nothing seems to happen
	// Pods returns the addresses of this node's pods, and a channel that is
	// closed when they have changed; nil if nobody knows. AutoMode needs it.
	Pods            func() ([]netip.Addr, <-chan struct{})
	Backend         Backend      // whose tables to use; "" means Auto
	BlockWireserver bool         // reject what pods send to 168.63.129.16, ports 80 and 32526
	AllowUnguarded  bool         // trust source addresses on bridges that nobody guards
	Logger          *slog.Logger // nil means slog.Default
}

// Reconciler keeps the rules in place.
type Reconciler struct {
	cfg    Config
	kernel *kernel // nil when no rules of ours are wanted
	status atomic.Pointer[Status]

	verdicts verdicts

	checks, repairs, cut atomic.Uint64

	// For Run alone.
	settled bool        // what others left has been dealt with
	warned  []string    // links that were warned of
	written []time.Time // when rules were put in place, in the last minute
	blamed  time.Time   // when it was last said that somebody else keeps changing them
}

// Status is what Run found or did at its last check.
type Status struct {
	Err       error  // why the rules are not in place; nil when they are
	Unguarded error  // why no source address can be trusted on some bridge, and what to do; wraps ErrUnguarded
	Mode      Mode   // other than AutoMode, once there was a check
	Why       string // this mode
	// Notes are what else somebody may want to know of the links to pods, a
	// sentence each.
	Notes []string
}

// ErrNotYet is the error of the Status before the first check.
var ErrNotYet = errors.New("the iptables rules are not in place yet")

// Stats are counts since New.
type Stats struct {
	Checks        uint64 // of the rules
	Repairs       uint64 // checks that found them wanting and wrote them, the first included
	LockContended uint64 // commands before which another program held the xtables lock
	Cut           uint64 // connections past the agent that were ended
}

// New checks that rules can be read here, and changes nothing. Its errors say
// what is missing: the iptables commands, privileges, or the kernel's nat table.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Mode == AutoMode && cfg.Pods == nil {
		return nil, errors.New("mode auto needs to know the pods' addresses")
	}
	r := &Reconciler{}
	if cfg.Mode != None || cfg.BlockWireserver {
		why := "it was asked for"
		var err error
		if cfg.Backend == Auto || cfg.Backend == "" {
			if cfg.Backend, why, err = detect(); err != nil {
				return nil, err
			}
		}
		if r.kernel, err = openKernel(cfg.Backend); err != nil {
			return nil, err
		}
		// A lock that is held now is free later; anything else is not.
		if _, err = r.kernel.read(ours[0]); err != nil && !errors.Is(err, errLocked) {
			return nil, err
		}
		cfg.Logger.Info("iptables backend", "backend", cfg.Backend, "why", why)
	}
	r.cfg = cfg
	r.status.Store(&Status{Err: ErrNotYet})
	return r, nil
}

// Status returns what the last check came to.
func (r *Reconciler) Status() Status { return *r.status.Load() }

// Stats returns what has been counted so far.
func (r *Reconciler) Stats() Stats {
	s := Stats{Checks: r.checks.Load(), Repairs: r.repairs.Load(), Cut: r.cut.Load()}
	if r.kernel != nil {
		s.LockContended = r.kernel.contended.Load()
	}
	return s
}

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
	w, err := newWatcher(ctx, r.cfg.Backend, r.tables())
	if err != nil {
		r.cfg.Logger.Warn("changes will be noticed late", "error", err, "every", r.cfg.Interval)
	}
	defer w.close()
	defer cancel()

	retry := min(firstRetry, r.cfg.Interval)
	due := time.NewTimer(0)
	defer due.Stop()
	var status Status
	var podsChanged <-chan struct{}
	look, check := true, true // at the pods' links, and at the rules
	for {
		if look {
			status, podsChanged = r.survey(status)
		}
		if check || status.Mode != r.status.Load().Mode {
			w.watched(func() bool {
				var changed bool
				changed, status.Err = r.reconcile(ctx, &status)
				return !changed && status.Err == nil
			})
			if ctx.Err() != nil {
				return
			}
			r.checks.Add(1)
			next := r.cfg.Interval
			if status.Err != nil {
				next = retry
				retry = min(2*retry, r.cfg.Interval)
				r.cfg.Logger.Error("the iptables rules are not in place; trying again", "error", status.Err, "in", next)
			} else {
				retry = min(firstRetry, r.cfg.Interval)
			}
			due.Reset(next)
		}
		published := status
		published.Notes = append(r.contest(), status.Notes...)
		r.status.Store(&published)
		select {
		case <-due.C:
			look, check = true, true
			continue
		case <-w.links: // the address on lo is one of them
			look, check = true, true
		case <-w.tables:
			look, check = false, true
		case <-podsChanged:
			look, check = true, false
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

// tables names the tables that rules of ours are wanted in.
func (r *Reconciler) tables() (names []string) {
	mode := r.cfg.Mode
	if mode == AutoMode {
		mode = DNAT // either
	}
	for _, c := range desired(r.cfg, mode) {
		names = append(names, c.table)
	}
	return names
}

// survey looks at the pods' interfaces: which mode to use now and why, and which
// addresses can be trusted. The channel says when to look again.
func (r *Reconciler) survey(last Status) (Status, <-chan struct{}) {
	s := Status{Err: last.Err, Mode: r.cfg.Mode, Why: "it was asked for"}
	if r.cfg.Pods == nil {
		return s, nil
	}
	pods, changed := r.cfg.Pods()
	links := newPodLinks()
	if r.cfg.Mode == AutoMode {
		s.Mode, s.Why = choose(pods, links)
		if s.Mode == AutoMode && last.Mode != "" { // not known any more: as before
			s.Mode, s.Why = last.Mode, last.Why
		}
	}
	var open []string
	open, s.Notes = surveySources(pods, links)
	if !r.cfg.AllowUnguarded {
		s.Unguarded = unguardedError(open)
	}
	if len(open) > 0 && !slices.Equal(open, r.warned) {
		r.cfg.Logger.Warn("pods can take each other's addresses, and with them identities (CVE-2021-1677)",
			"links", open, "tokens", map[bool]string{true: "handed out all the same", false: "withheld"}[r.cfg.AllowUnguarded])
	}
	r.warned = open
	return s, changed
}

// reconcile makes the kernel's state the desired one, and reports whether it had
// to change the tables for that. Where the mode cannot be told yet, it settles on
// the one whose rules are there, so that a restart changes nothing; else on DNAT.
func (r *Reconciler) reconcile(ctx context.Context, status *Status) (changed bool, err error) {
	if r.kernel == nil {
		return false, nil
	}
	if status.Mode == AutoMode {
		status.Mode = DNAT
		before := desired(r.cfg, Redirect)[0]
		if s, err := r.kernel.read(before); err == nil && s.install(before.rules) == "" {
			status.Mode = Redirect
		}
	}
	if status.Mode == DNAT {
		if err := ensureAddress(r.cfg.Address); err != nil {
			return false, err
		}
	}
	want := desired(r.cfg, status.Mode)
	failed := make([]error, len(want))
	for i, c := range want { // the redirect is the first, and does not depend on the other
		var wrote bool
		wrote, failed[i] = r.ensure(ctx, c, status)
		changed = changed || wrote
	}
	if changed {
		r.repairs.Add(1)
		r.settled = false
		r.written = append(r.written, time.Now())
	}
	if !r.settled && failed[0] == nil {
		r.settle(ctx)
	}
	return changed, errors.Join(failed...)
}

func (r *Reconciler) ensure(ctx context.Context, want chain, status *Status) (changed bool, err error) {
	s, err := r.kernel.read(want)
	if err != nil {
		return false, err
	}
	change := s.install(want.rules)
	if change == "" {
		return false, nil
	}
	if err := r.kernel.apply(ctx, change); err != nil {
		return false, err
	}
	level := slog.LevelInfo
	if len(r.written) > contested {
		level = slog.LevelDebug // it is said once a minute, see contest
	}
	r.cfg.Logger.Log(ctx, level, "iptables rules put in place", "chain", want.name, "mode", status.Mode, "why", status.Why, "taken_over", s.exists)
	return true, nil
}

// contested is how often in a minute rules are written for ordinary reasons.
const contested = 5

// contest says so when somebody else keeps changing the rules. They are put back
// at the same pace all the same: each moment without them is one in which a pod
// reaches the node's identity.
func (r *Reconciler) contest() []string {
	now := time.Now()
	r.written = slices.DeleteFunc(r.written, func(at time.Time) bool { return now.Sub(at) > time.Minute })
	if len(r.written) <= contested {
		return nil
	}
	if now.Sub(r.blamed) > time.Minute {
		r.blamed = now
		r.cfg.Logger.Warn("another program keeps changing the rules in the place of ours", "repairs_in_last_minute", len(r.written))
	}
	return []string{fmt.Sprintf("another program keeps changing the iptables rules: they were put back %d times in the last minute", len(r.written))}
}
