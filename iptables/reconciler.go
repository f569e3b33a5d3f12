// Package iptables maintains the rules that redirect pods' requests to the metadata
// service to the agent, and two fences that keep all other packets of pods away from it.
//
// The redirect serves, the fences protect. The redirect is a rule of the nat table,
// which sees only the first packet of a connection, in its original direction: a forged
// packet, a NOTRACK rule or a flush is a way around it. No packet to or from the
// metadata service is ever legitimately forwarded, so each fence refuses all of them: a
// guard chain, first in FORWARD of the mangle table, and policy routing rules, which
// share nothing with iptables. Either is enough.
//
// The life of the rules:
//
//  1. The desired rules follow from the configuration and the mode alone.
//  2. Run reads the kernel's state and writes what differs, the fences first. One
//     iptables-restore writes a chain in one transaction: half of the rules are never in
//     place. An error in one part does not keep the others from being written.
//  3. Stale state is cleaned up: chains of an old agent in the other backend, connections
//     from before the rules.
//  4. Run reconciles again when the kernel announces a change of links, addresses,
//     routing rules or tables, and every interval. When links or pods change it selects
//     the mode anew, by the interfaces that lead to pods.
//  5. The rules stay when Run ends, however it ends. Without an agent behind them a
//     pod's connection is refused; it never reaches the node's own identity.
//  6. Cleanup removes the agent's own rules, and nothing else.
package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/iptables/links"
)

// DefaultAddress is the default for Config.Address. It is link-local, next to the
// metadata service's, and network policies can name it.
var DefaultAddress = netip.MustParseAddr("169.254.169.252")

// Config says what is redirected and where to. Mode, Metadata, Port, Address and
// Interval are required; Cleanup needs Address alone.
type Config struct {
	Mode Mode
	// Reason is why Mode was chosen; "" means that a flag set it.
	Reason   string
	Metadata netip.AddrPort // of the metadata service, IPv4
	Port     uint16         // that the agent listens on
	Address  netip.Addr     // the destination in the modes DNAT and EBPF; if the node lacks it, it is added to lo, and must be link-local
	Interval time.Duration  // between two checks of the rules without an announced change
	// Pods returns the addresses of this node's pods, and a channel that is closed when
	// they have changed. ModeAuto requires it.
	Pods            func() ([]netip.Addr, <-chan struct{}) `json:"-"`
	Backend         Backend                                // whose tables to use; "" means BackendAuto
	BlockWireserver bool                                   // reject what pods send to 168.63.129.16, ports 80 and 32526
	// Programs are those of mode EBPF. Metadata and Agent in it need not be given.
	Programs ebpf.Config
	// HostNetworkPods returns the UIDs of the pods on the host network that mode EBPF redirects
	// although Programs.HostNetworkAll is not set, and of those that it leaves alone; nil for none. It
	// is asked when Pods have changed. Unless they are known (ok), those that an earlier agent
	// redirected stay so.
	HostNetworkPods func() (bound, unbound []string, ok bool) `json:"-"`
	Logger          *slog.Logger                              `json:"-"` // nil means slog.Default
}

// Reconciler keeps the rules in place.
type Reconciler struct {
	cfg      Config
	status   atomic.Pointer[Status]
	programs *ebpf.Programs // nil in other modes than EBPF

	counts counts

	// Used by New and Run only.
	runner       *runner             // nil as long as iptables is not usable
	cleaned      bool                // cleanStale has succeeded since the last repair
	fenced       bool                // the last reconciliation of this Run left the routing fence in place
	last         map[string][]string // by part, the rules that a reconciliation of this Run left in place
	lastOptional string              // error of parts that are not required, as last logged
	repairTimes  []time.Time         // in the last minute
	lastConflict time.Time           // when lossNotes last warned
	lastLoss     loss                // of this Run or an earlier one
	lastBind     string              // error of the last bind
	lastClean    string              // error of the last cleanStale that was logged
}

// Status is the outcome of the last reconciliation.
type Status struct {
	Err error // why required rules are not in place; nil when they are
	// Bypass is why rules may be without effect, and what to do; it wraps
	// links.ErrBypass. In another mode than ModeAuto it is a note.
	Bypass error
	Mode   Mode   // after the first reconciliation other than ModeAuto
	Reason string // for this mode
	// Backend is whose tables are used; "" if iptables is not usable.
	Backend Backend
	// InPlace has each part that is to be in place, and whether the last reconciliation left it
	// so. It does not change.
	InPlace map[string]bool
	// Notes are what else an operator may want to know of the rules, a sentence each.
	Notes []string

	ruleNotes []string // the part of Notes that comes from reconcile
}

// errNotYet is the error of the Status before the first reconciliation.
var errNotYet = errors.New("the iptables rules are not in place yet")

// New changes nothing. Its errors say which privileges are missing; mode None requires
// none. Whatever else keeps rules from being written is in the Status and retried by
// Run: an agent that exited for it would leave the node without the other rules.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Mode == ModeAuto && cfg.Pods == nil {
		return nil, errors.New("mode auto requires the pods' addresses")
	}
	if cfg.Mode == EBPF {
		if err := ebpf.Privileges(); err != nil {
			return nil, err
		}
	}
	if cfg.Mode != None && cfg.Mode != EBPF || cfg.BlockWireserver {
		if missing := missingCapabilities(); len(missing) > 0 {
			return nil, permissionAdvice(missing)
		}
	}
	r := &Reconciler{cfg: cfg, last: make(map[string][]string)}
	if cfg.Mode == EBPF {
		r.programs = ebpf.New(cfg.programs())
	}
	if err := r.open(); err != nil {
		cfg.Logger.Warn("iptables is not usable; retrying", "error", err)
	}
	r.status.Store(&Status{Err: errNotYet})
	return r, nil
}

// open selects the backend and finds its commands, if that has not been done yet.
func (r *Reconciler) open() (err error) {
	if r.runner != nil {
		return nil
	}
	backend, reason, err := selectBackend(r.cfg.Backend)
	if err != nil {
		return err
	}
	if r.runner, err = newRunner(backend, &r.counts.contended); err != nil {
		return err
	}
	r.cfg.Logger.Info("iptables backend selected", "backend", backend, "reason", reason)
	return nil
}

// Status returns the outcome of the last reconciliation.
func (r *Reconciler) Status() Status { return *r.status.Load() }

const (
	// firstRetry is the pause after a failure; it doubles up to the interval.
	firstRetry = time.Second
	// debounce is the least time between two reconciliations that changes trigger: on a
	// node where kube-proxy writes rules all the time, one answers for many. The first
	// change after a quiet time is not delayed.
	debounce = 500 * time.Millisecond
	// reasonFlag is the reason for a mode or a backend that was configured.
	reasonFlag = "set by flag"
)

// Run keeps the rules in place until ctx ends, and leaves them there.
func (r *Reconciler) Run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	w, err := newWatcher(ctx, r.backend(), r.tables())
	if err != nil {
		r.cfg.Logger.Warn("watching for changes failed; checking periodically", "error", err, "interval", r.cfg.Interval)
	}
	defer w.close()
	defer cancel()

	// Changes since an earlier Run may be those of the agent that had taken over.
	r.fenced = false
	clear(r.last)
	retry := min(firstRetry, r.cfg.Interval)
	due := time.NewTimer(0)
	defer due.Stop()
	var status Status
	var podsChanged <-chan struct{}
	podsTrigger, rulesTrigger := true, true
	for {
		if podsTrigger {
			status, podsChanged = r.selectMode(status)
		}
		if rulesTrigger || status.Mode != r.status.Load().Mode {
			w.observe(func() bool {
				var changed bool
				changed, status.Err = r.reconcile(ctx, &status)
				return !changed && status.Err == nil
			})
			if ctx.Err() != nil {
				return
			}
			r.counts.checks.Add(1)
			next := r.cfg.Interval
			if status.Err != nil {
				next = retry
				retry = min(2*retry, r.cfg.Interval)
				reason := status.Problem()
				r.cfg.Logger.Error("putting rules in place failed; retrying", "reason", reason, "error", status.Err, "in", next, "fix", status.Fix())
			} else {
				retry = min(firstRetry, r.cfg.Interval)
			}
			due.Reset(next)
		}
		published := status
		published.Notes = slices.Concat(r.lossNotes(time.Now()), status.ruleNotes, status.Notes)
		r.status.Store(&published)
		checked := time.Now()
		select {
		case <-r.bind():
			podsTrigger, rulesTrigger = false, false
			continue
		case <-due.C:
			podsTrigger, rulesTrigger = true, true
			continue
		case <-w.links: // also when the address on lo is removed
			podsTrigger, rulesTrigger = true, true
		case <-w.rules:
			podsTrigger, rulesTrigger = false, true
		case <-podsChanged:
			podsTrigger, rulesTrigger = true, false
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

// backend returns the backend that is used; "" if iptables is not usable.
func (r *Reconciler) backend() Backend {
	if r.runner == nil {
		return ""
	}
	return r.runner.backend
}

// tables names the tables that the configuration writes to.
func (r *Reconciler) tables() (names []string) {
	mode := r.cfg.Mode
	if mode == ModeAuto {
		mode = DNAT // Redirect has the same
	}
	for _, c := range slices.Concat(desired(r.cfg, mode), hardening(r.cfg, mode)) {
		if !slices.Contains(names, c.table) {
			names = append(names, c.table)
		}
	}
	return names
}

// selectMode selects the mode by the interfaces that lead to pods, and looks for a
// dataplane that bypasses iptables. The channel is closed when pods have changed.
func (r *Reconciler) selectMode(last Status) (Status, <-chan struct{}) {
	s := Status{Err: last.Err, Mode: r.cfg.Mode, Reason: cmp.Or(r.cfg.Reason, reasonFlag), Backend: last.Backend, InPlace: last.InPlace, ruleNotes: last.ruleNotes}
	if r.cfg.Pods == nil {
		return s, nil
	}
	if r.cfg.Programs.HostNetworkAll && r.programs == nil {
		s.Notes = append(s.Notes, "--host-network-pods=bound is without effect, and host-network pods get what IMDS gives the node: rules do not see these pods; --redirect-mode=ebpf does")
	}
	pods, changed := r.cfg.Pods()
	if r.cfg.Mode == ModeAuto {
		s.Mode, s.Reason = ModeFor(pods)
		if s.Mode == ModeAuto && last.Mode != "" { // no pods any more: unchanged
			s.Mode, s.Reason = last.Mode, last.Reason
		}
	}
	switch bypass := links.Bypass(); {
	case bypass == nil || r.cfg.Mode == None || r.cfg.Mode == EBPF:
	case r.cfg.Mode == ModeAuto:
		s.Bypass = fmt.Errorf("mode auto cannot tell whether a redirect would work: %w: use --redirect-mode=ebpf, or none with a local redirect policy "+
			"(deploy/cilium), or, if you know that Cilium routes through iptables here (legacy host routing), --redirect-mode=dnat; %w", bypass, advise(ebpf.Possible(r.cfg.Programs)))
	default:
		s.Notes = append(s.Notes, fmt.Sprintf("mode %s is set, although %s", r.cfg.Mode, bypass))
	}
	return s, changed
}
