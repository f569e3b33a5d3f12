// Package iptables keeps the rules that hand pods' calls to the metadata service
// to the agent, and two fences that keep everything else of pods' away from it.
//
// The redirect serves, the fences protect. The redirect is a rule of the nat table,
// which sees the first packet of a connection alone, in its original direction: a
// forged packet, a NOTRACK rule or a flush is a way around it. No packet to or from
// the metadata service is ever forwarded with good reason, and so each fence refuses
// all of them: a guard chain, first in FORWARD of the mangle table, and policy routing
// rules, which have nothing in common with iptables. Either is enough.
//
// The life of the rules:
//
//  1. The desired rules follow from the configuration and the mode alone.
//  2. Run reads what the kernel has. What is not as desired is written, the fences
//     first. One iptables-restore writes a chain in one transaction: there is no
//     moment with half of the rules. A part that fails hinders no other.
//  3. What was there before is dealt with: the chains of an old agent in the other
//     backend, connections from before the rules.
//  4. It checks them again as soon as the kernel announces a change of links,
//     addresses, routing rules or tables, when pods come and go, and every interval.
//     Each time it looks at the interfaces that lead to pods: they decide the mode.
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

	"github.com/podidentity/nmi/iptables/links"
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
	Logger          *slog.Logger // nil means slog.Default
}

// Reconciler keeps the rules in place.
type Reconciler struct {
	cfg    Config
	status atomic.Pointer[Status]

	checks, repairs, cut atomic.Uint64
	contended            atomic.Uint64
	lost                 map[string]*atomic.Uint64 // by part; all of parts are there

	// For New and Run alone.
	kernel   *kernel             // nil as long as there are no iptables commands
	settled  bool                // what others left has been dealt with
	fenced   bool                // the last check of this Run left the routing fence in place
	last     map[string][]string // by part, the rules of the chain that a check of this Run left in place
	optional string              // error of a fence that mode None goes on without, as last logged
	written  []time.Time         // when rules were put in place, in the last minute
	blamed   time.Time           // when it was last said that somebody else keeps changing them
}

// Status is what Run found or did at its last check.
type Status struct {
	Err error // why the rules are not in place; nil when they are
	// Bypass is why rules may be in vain, and what to do; wraps links.ErrBypass. It is
	// for AutoMode alone: somebody who chose a mode is told by a note.
	Bypass error
	Mode   Mode   // other than AutoMode, once there was a check
	Why    string // this mode
	// Notes are what else somebody may want to know of the rules, a sentence each.
	Notes []string

	rules []string // those of the Notes that the last check of the rules gave
}

// errNotYet is the error of the Status before the first check.
var errNotYet = errors.New("the iptables rules are not in place yet")

// Stats are counts since New.
type Stats struct {
	Checks        uint64            // of the rules
	Repairs       uint64            // checks that found them wanting and wrote them, the first included
	Lost          map[string]uint64 // by part, times that it had been in place and was gone
	LockContended uint64            // commands before which another program held the xtables lock
	Cut           uint64            // connections past the agent that were ended
}

// New changes nothing. Its errors say which privileges are missing; mode None needs
// none. Whatever else hinders the rules is in the Status, and tried again by Run: an
// agent that ended for it would leave the node without the rest of them.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Mode == AutoMode && cfg.Pods == nil {
		return nil, errors.New("mode auto needs to know the pods' addresses")
	}
	if cfg.Mode != None || cfg.BlockWireserver {
		if missing := missingCapabilities(); len(missing) > 0 {
			return nil, permissionAdvice(missing)
		}
	}
	r := &Reconciler{cfg: cfg, last: make(map[string][]string), lost: make(map[string]*atomic.Uint64)}
	for _, part := range parts {
		r.lost[part] = new(atomic.Uint64)
	}
	if err := r.open(); err != nil {
		cfg.Logger.Warn("no iptables rules can be written", "error", err)
	}
	r.status.Store(&Status{Err: errNotYet})
	return r, nil
}

// open finds the backend and its commands, if that has not been done yet.
func (r *Reconciler) open() (err error) {
	if r.kernel != nil {
		return nil
	}
	backend, why := r.cfg.Backend, "it was asked for"
	if backend == Auto || backend == "" {
		if backend, why, err = detect(); err != nil {
			return err
		}
	}
	if r.kernel, err = openKernel(backend, &r.contended); err != nil {
		return err
	}
	r.cfg.Logger.Info("iptables backend", "backend", backend, "why", why)
	return nil
}

// Status returns what the last check came to.
func (r *Reconciler) Status() Status { return *r.status.Load() }

// Stats returns what has been counted so far.
func (r *Reconciler) Stats() Stats {
	s := Stats{
		Checks: r.checks.Load(), Repairs: r.repairs.Load(), Cut: r.cut.Load(), LockContended: r.contended.Load(),
		Lost: make(map[string]uint64, len(r.lost)),
	}
	for part, n := range r.lost {
		s.Lost[part] = n.Load()
	}
	return s
}

const (
	// firstRetry is the pause after a failure; it doubles up to the interval.
	firstRetry = time.Second
	// debounce is the least time from one check to the next that a change gives
	// rise to: on a node where kube-proxy writes rules all the time, one check
	// answers for many. The first of several changes is not kept waiting.
	debounce = 500 * time.Millisecond
)

// Run keeps the rules in place until ctx ends: it checks them when the kernel
// announces a change, when pods come and go, and every interval. It leaves them
// there.
func (r *Reconciler) Run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	w, err := newWatcher(ctx, r.backend(), r.tables())
	if err != nil {
		r.cfg.Logger.Warn("changes will be noticed late", "error", err, "every", r.cfg.Interval)
	}
	defer w.close()
	defer cancel()

	// What happened to the rules since an earlier Run was perhaps the doing of the
	// agent that had taken over.
	r.fenced = false
	clear(r.last)
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
				r.cfg.Logger.Error("not all rules are in place; trying again", "error", status.Err, "in", next)
			} else {
				retry = min(firstRetry, r.cfg.Interval)
			}
			due.Reset(next)
		}
		published := status
		published.Notes = slices.Concat(r.contest(), status.rules, status.Notes)
		r.status.Store(&published)
		checked := time.Now()
		select {
		case <-due.C:
			look, check = true, true
			continue
		case <-w.links: // the address on lo is one of them
			look, check = true, true
		case <-w.rules:
			look, check = false, true
		case <-podsChanged:
			look, check = true, false
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(time.Until(checked.Add(debounce))):
		case <-ctx.Done():
			return
		}
	}
}

// backend is the one whose tables are used; "" if that is not known yet.
func (r *Reconciler) backend() Backend {
	if r.kernel == nil {
		return ""
	}
	return r.kernel.backend
}

// tables names the tables that rules of ours are wanted in.
func (r *Reconciler) tables() (names []string) {
	mode := r.cfg.Mode
	if mode == AutoMode {
		mode = DNAT // either
	}
	for _, c := range slices.Concat(desired(r.cfg, mode), hardening(r.cfg, mode)) {
		if !slices.Contains(names, c.table) {
			names = append(names, c.table)
		}
	}
	return names
}

// survey looks at the pods' interfaces: which mode to use now and why. The channel says
// when to look again.
func (r *Reconciler) survey(last Status) (Status, <-chan struct{}) {
	s := Status{Err: last.Err, Mode: r.cfg.Mode, Why: "it was asked for", rules: last.rules}
	if r.cfg.Pods == nil {
		return s, nil
	}
	pods, changed := r.cfg.Pods()
	if r.cfg.Mode == AutoMode {
		s.Mode, s.Why = choose(pods)
		if s.Mode == AutoMode && last.Mode != "" { // not known any more: as before
			s.Mode, s.Why = last.Mode, last.Why
		}
	}
	switch bypass := links.Bypass(); {
	case bypass == nil || r.cfg.Mode == None:
	case r.cfg.Mode == AutoMode:
		s.Bypass = fmt.Errorf("mode auto cannot tell whether the redirect works: %w: use --redirect-mode=none with a local redirect policy "+
			"(deploy/cilium), or, if you know that Cilium routes through iptables here (legacy host routing), --redirect-mode=dnat", bypass)
	default:
		s.Notes = append(s.Notes, fmt.Sprintf("mode %s was chosen, although %s", r.cfg.Mode, bypass))
	}
	return s, changed
}
