package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/podidentity/nmi/iptables/ebpf"
)

// The parts of what Run keeps in place, as logs and metrics name them.
const (
	partRouting    = "routing"    // the routing fence
	partGuard      = "guard"      // the guard chain
	partRedirect   = "redirect"   // the redirect
	partWireserver = "wireserver" // the rule of BlockWireserver
	partInput      = "input"      // the rule against connections that were not redirected
	partAntispoof  = "antispoof"  // the rule against forged packets
	partEgress     = "egress"     // in mode EBPF, the fence where pods send
)

// parts lists all of them, in the order in which they are written.
var parts = [...]string{partRouting, partGuard, partEgress, partRedirect, partWireserver, partInput, partAntispoof}

// result is what one reconciliation found and did.
type result struct {
	written  []string // parts that were missing or wrong, and have been written
	lost     []string // parts that this Run had left in place, and that were gone or changed
	down     []string // fences that were not in place before, or that the mode has not
	notes    []string
	inPlace  map[string]bool // by part, whether it is now
	err      error           // of parts that are required
	optional error           // of parts that are not
}

// reconcile makes the kernel's state the desired one, and reports whether it changed
// anything. The fences come first, and what the agent can do without comes last. An
// error in one part does not keep the others from being written.
//
// As long as the mode is not known, it keeps the one whose rules are there, so that a
// restart changes nothing; else it takes DNAT.
func (r *Reconciler) reconcile(ctx context.Context, status *Status) (changed bool, err error) {
	res := result{inPlace: make(map[string]bool)}
	r.ensureRouting(&res)
	r.ensurePrograms(&res)
	redirected := r.ensureRequired(ctx, &res, status)
	r.report(ctx, res.written, res.lost, res.down, status)
	if r.runner != nil {
		written, lost := len(res.written), len(res.lost)
		r.ensureChains(ctx, &res, hardening(r.cfg, status.Mode))
		r.report(ctx, res.written[written:], res.lost[lost:], nil, status)
	}
	if len(res.written) > 0 {
		r.counts.repairs.Add(1)
		r.repairTimes = append(r.repairTimes, time.Now())
		r.cleaned = false
	}
	if r.programs != nil && !res.inPlace[partGuard] {
		delete(res.inPlace, partGuard) // not asked for in this mode; a note says why it is missing
	}
	if !r.cleaned && redirected && (r.programs == nil || res.inPlace[partRedirect]) {
		r.cleanStale(ctx)
	}
	if r.programs == nil { // after cleanStale, which removes them if it may
		if err := LeftPrograms(r.cfg); err != nil {
			r.fail(&res, partRedirect, err)
		}
	}
	if r.cfg.Mode == ModeAuto && causeOf(res.err) == CausePermission {
		res.err = errors.Join(res.err, advise(ebpf.Possible(r.cfg.Programs)))
	}
	status.Backend, status.InPlace, status.ruleNotes = r.backend(), res.inPlace, res.notes
	if res.optional != nil {
		if text := res.optional.Error(); text != r.lastOptional {
			r.cfg.Logger.WarnContext(ctx, "running without rules that are not required", "error", res.optional)
		}
		status.ruleNotes = append(status.ruleNotes, "running without rules that are not required: "+strings.ReplaceAll(res.optional.Error(), "\n", "; "))
	}
	r.lastOptional = errorText(res.optional)
	return len(res.written) > 0, res.err
}

// report logs which parts were lost, with the consequence for pods, and which have been
// written.
func (r *Reconciler) report(ctx context.Context, written, lost, down []string, status *Status) {
	warn, info := slog.LevelWarn, slog.LevelInfo
	if len(r.repairTimes) >= conflictThreshold { // lossNotes warns once a minute instead
		warn, info = slog.LevelDebug, slog.LevelDebug
	}
	if len(lost) > 0 {
		for _, part := range lost {
			r.counts.addLost(part)
		}
		r.lastLoss = loss{time.Now(), lost, impact(lost, down)}
		r.cfg.Logger.Log(ctx, warn, "rules were removed or changed by another program", "rules", lost, "impact", r.lastLoss.impact, "fix", findProgram)
	}
	if len(written) > 0 {
		r.cfg.Logger.Log(ctx, info, "routing and iptables rules put in place", "rules", written, "mode", status.Mode, "reason", status.Reason)
	}
}

// loss is parts that another program removed or changed. They were put back at once.
type loss struct {
	at     time.Time
	parts  []string
	impact string
}

const (
	// lossNoteTime is how long a loss is worth a note.
	lossNoteTime = time.Hour
	// findProgram is what to do about a loss. The kernel names the process that changes rules of
	// nftables in its announcements (NFTA_GEN_PROC_NAME); "nft monitor" prints them.
	findProgram = "find the program and have it leave these rules alone: on the node, nft monitor names the process of each change, and ip monitor rule shows those of routing rules"
)

// impact says what pods could do while parts were lost and fences down.
func impact(lost, down []string) string {
	var texts []string
	switch {
	case slices.Contains(down, partRouting) && slices.Contains(down, partGuard) && slices.Contains(down, partEgress):
		texts = append(texts, "all fences were down: pods may have reached the metadata service and got tokens of the node's identities")
	case slices.Contains(lost, partRedirect):
		texts = append(texts, "pods' token requests were refused or dropped; a fence kept them from the metadata service")
	case slices.Contains(lost, partRouting) || slices.Contains(lost, partGuard) || slices.Contains(lost, partEgress):
		texts = append(texts, "none: pods' token requests were served, and another fence was in place")
	}
	for _, tc := range []struct{ part, text string }{
		{partWireserver, "pods may have reached the wireserver"},
		{partInput, "the agent itself had to refuse connections that were not redirected"},
		{partAntispoof, "forged packets may have kept the node from the metadata service"},
	} {
		if slices.Contains(lost, tc.part) {
			texts = append(texts, tc.text)
		}
	}
	return strings.Join(texts, "; ")
}

// Fence writes the fences that are missing, and returns why one could not be written. It
// is for before Run, which tries again: an agent that fails to start must not leave the
// node open. Fences of another agent, which may be for another metadata address, stay
// until Run replaces them: this agent may never get that far. From now on Caller knows the
// callers of connections that another agent's programs redirect.
func (r *Reconciler) Fence(ctx context.Context) error {
	var written []string
	added, routingErr := addRoutingFence(r.cfg.Metadata.Addr())
	if added {
		written = append(written, partRouting)
	}
	guardErr := r.open()
	if guardErr == nil {
		guard := desired(r.cfg, None)[0]
		var s state
		if s, guardErr = r.runner.read(guard); guardErr == nil && len(s.rules) == 0 {
			guardErr = r.runner.apply(ctx, s.install(guard.rules))
			written = append(written, partGuard)
		}
	}
	if len(written) > 0 {
		r.cfg.Logger.InfoContext(ctx, "fences put in place", "rules", written)
	}
	if r.programs != nil {
		return errors.Join(routingErr, guardErr, r.programs.Load())
	}
	return errors.Join(routingErr, guardErr)
}

// required reports whether the agent is not ready without a part. In mode None nothing
// is required but what was asked for. Hardening never is: on a kernel without a module
// for it, an agent that serves is better than none.
func (r *Reconciler) required(part string) bool {
	switch part {
	case partWireserver:
		return true
	case partInput, partAntispoof:
		return false
	case partGuard: // where rules are forbidden, mode EBPF has two fences without it
		return r.cfg.Mode != None && r.cfg.Mode != EBPF
	default:
		return r.cfg.Mode != None
	}
}

// fail records why a part is not in place.
func (r *Reconciler) fail(res *result, part string, err error) {
	r.counts.errors[causeOf(err)].Add(1)
	if r.required(part) {
		res.err = errors.Join(res.err, err)
	} else {
		res.optional = errors.Join(res.optional, err)
	}
}

func (r *Reconciler) ensureRouting(res *result) {
	intact, written, notes, err := ensureRoutingFence(r.cfg.Metadata.Addr())
	if !intact {
		res.down = append(res.down, partRouting)
		if r.fenced {
			res.lost = append(res.lost, partRouting)
		}
	}
	r.fenced = err == nil
	if res.inPlace[partRouting] = r.fenced; !r.fenced {
		r.fail(res, partRouting, fmt.Errorf("the policy routing rules that refuse packets forwarded to the metadata service are not in place: %w", err))
	} else if written {
		res.written = append(res.written, partRouting)
	}
	res.notes = append(res.notes, notes...)
}

// ensureRequired ensures the chains that are desired, and reports whether the redirect,
// if there is to be one, is in place.
func (r *Reconciler) ensureRequired(ctx context.Context, res *result, status *Status) (redirected bool) {
	err := r.open()
	if status.Mode == ModeAuto {
		status.Mode = DNAT
		if err == nil && r.inPlace(desired(r.cfg, Redirect)[1]) {
			status.Mode = Redirect
		}
	}
	if err != nil {
		for _, c := range slices.Concat(desired(r.cfg, status.Mode), hardening(r.cfg, status.Mode)) {
			res.inPlace[c.part] = false
		}
		res.down = append(res.down, partGuard)
		part := partGuard
		if r.cfg.BlockWireserver {
			part = partWireserver
		}
		r.fail(res, part, fmt.Errorf("iptables is not usable: %w", err))
		return false
	}
	return r.ensureChains(ctx, res, desired(r.cfg, status.Mode))
}

// ensureChains reports whether the redirect, if it is among the chains, is in place.
func (r *Reconciler) ensureChains(ctx context.Context, res *result, chains []chain) (redirected bool) {
	redirected = true
	found := r.runner.readAll(chains)
	for i, want := range chains {
		intact, err := r.ensureChain(ctx, res, want, found[i])
		if want.part == partGuard && !intact {
			res.down = append(res.down, want.part)
		}
		if res.inPlace[want.part] = err == nil; err != nil {
			redirected = redirected && want.part != partRedirect
			r.fail(res, want.part, fmt.Errorf("%s (chain %s, %s) is not in place: %w", want.purpose, want.name, want.place(), err))
		}
	}
	return redirected
}

// inPlace reports whether a chain and its jump are as desired.
func (r *Reconciler) inPlace(want chain) bool {
	s, err := r.runner.read(want)
	return err == nil && s.install(want.rules) == ""
}

// ensureChain makes a chain and its jump as desired, and reports whether they were.
func (r *Reconciler) ensureChain(ctx context.Context, res *result, want chain, found stateOrError) (intact bool, err error) {
	if found.err != nil {
		return false, found.err
	}
	s := found.state
	if want.part == partRedirect && strings.Contains(want.rules[0], "-j DNAT") {
		if err := ensureAddress(r.cfg.Address); err != nil {
			return false, err
		}
	}
	if last, ok := r.last[want.part]; ok && !s.inEffect(last) {
		res.lost = append(res.lost, want.part)
		delete(r.last, want.part)
	}
	change := s.install(want.rules)
	if change != "" {
		if err := r.runner.apply(ctx, change); err != nil {
			return false, err
		}
		res.written = append(res.written, want.part)
	}
	r.last[want.part] = want.rules
	return change == "", nil
}

// conflictThreshold is how often in a minute rules are written for ordinary reasons.
const conflictThreshold = 5

// lossNotes returns a note on the last loss of rules in the last hour. While another program keeps
// changing the rules, it warns, too. They are repaired at the same pace all the same: pods are
// refused as long as they are missing.
func (r *Reconciler) lossNotes(now time.Time) []string {
	r.repairTimes = slices.DeleteFunc(r.repairTimes, func(at time.Time) bool { return now.Sub(at) > time.Minute })
	if len(r.repairTimes) > conflictThreshold {
		if now.Sub(r.lastConflict) > time.Minute {
			r.lastConflict = now
			r.cfg.Logger.Warn("another program keeps changing the rules", "repairs_in_last_minute", len(r.repairTimes), "fix", findProgram)
		}
		return []string{fmt.Sprintf("another program keeps changing the rules: repaired %d times in the last minute: %s", len(r.repairTimes), findProgram)}
	}
	if r.lastLoss.at.IsZero() || now.Sub(r.lastLoss.at) > lossNoteTime {
		return nil
	}
	return []string{fmt.Sprintf("another program removed or changed rules at %s (%s; impact: %s), and they were put back: %s",
		r.lastLoss.at.UTC().Format(time.RFC3339), strings.Join(r.lastLoss.parts, ", "), r.lastLoss.impact, findProgram)}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
