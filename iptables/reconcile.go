package iptables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// What Run keeps in place, by the names that logs and metrics have for it.
const (
	partRouting    = "routing"    // the routing fence
	partGuard      = "guard"      // the guard chain
	partRedirect   = "redirect"   // the redirect
	partWireserver = "wireserver" // the rule of BlockWireserver
	partInput      = "input"      // the rule against connections that were not redirected
	partAntispoof  = "antispoof"  // the rule against forged packets
)

// parts lists what Run keeps in place, in the order in which it is written.
var parts = []string{partRouting, partGuard, partRedirect, partWireserver, partInput, partAntispoof}

// check is one check of everything that Run keeps in place.
type check struct {
	written  []string // parts that had to be written
	gone     []string // parts that an earlier check left in place, and that were not there
	down     []string // fences that did not stand when the check began
	notes    []string
	err      error // of parts that are required
	optional error // of parts that are not
}

// reconcile makes the kernel's state the desired one, and reports whether it had
// to change it for that. The fences come first. A part that fails hinders no other.
//
// Where the mode cannot be told yet, it decides for the one whose rules are there, so
// that a restart changes nothing; else for DNAT.
func (r *Reconciler) reconcile(ctx context.Context, status *Status) (changed bool, err error) {
	var c check
	r.checkRoutingFence(&c)
	redirected := r.checkRequired(ctx, &c, status)
	r.logGone(ctx, &c)
	r.logWritten(ctx, c.written, status)
	if r.kernel != nil {
		required := len(c.written)
		c.gone = nil
		r.checkChains(ctx, &c, hardening(r.cfg, status.Mode))
		r.logGone(ctx, &c)
		r.logWritten(ctx, c.written[required:], status)
	}
	if len(c.written) > 0 {
		r.repairs.Add(1)
		r.written = append(r.written, time.Now())
		r.settled = false
	}
	status.rules = c.notes
	if c.optional != nil {
		if text := c.optional.Error(); text != r.optional {
			r.cfg.Logger.Warn("running without rules that are not required", "error", c.optional)
		}
		status.rules = append(status.rules, "running without rules that are not required: "+strings.ReplaceAll(c.optional.Error(), "\n", "; "))
	}
	r.optional = errorText(c.optional)
	if !r.settled && redirected {
		r.settle(ctx)
	}
	return len(c.written) > 0, c.err
}

// logWritten says which parts have just been written.
func (r *Reconciler) logWritten(ctx context.Context, written []string, status *Status) {
	if len(written) == 0 {
		return
	}
	level := slog.LevelInfo
	if len(r.written) >= contested {
		level = slog.LevelDebug // it is said once a minute, see contest
	}
	r.cfg.Logger.Log(ctx, level, "routing and iptables rules put in place", "rules", written, "mode", status.Mode, "why", status.Why)
}

// Fence writes the fences now where there are none, and returns why one could not be
// written. It is for before Run, which tries again: whatever keeps the rest of the agent
// from starting must not leave the node open. Fences of another agent, which may be for
// another metadata address, stay as they are until Run replaces them: this agent may
// never come so far.
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
		if s, guardErr = r.kernel.read(guard); guardErr == nil && len(s.rules) == 0 {
			guardErr = r.kernel.apply(ctx, s.install(guard.rules))
			written = append(written, partGuard)
		}
	}
	if len(written) > 0 {
		r.cfg.Logger.InfoContext(ctx, "fences put in place", "rules", written)
	}
	return errors.Join(routingErr, guardErr)
}

// failed records the error of a part. In mode None nothing is required but what was
// asked for. What hardens is nowhere: a node whose kernel lacks a module for it is
// better off with an agent that serves.
func (r *Reconciler) failed(c *check, part string, err error) {
	if r.cfg.Mode == None && part != partWireserver || part == partInput || part == partAntispoof {
		c.optional = errors.Join(c.optional, err)
	} else {
		c.err = errors.Join(c.err, err)
	}
}

func (r *Reconciler) checkRoutingFence(c *check) {
	standing, written, notes, err := ensureRoutingFence(r.cfg.Metadata.Addr())
	if !standing {
		c.down = append(c.down, partRouting)
		if r.fenced {
			c.gone = append(c.gone, partRouting)
		}
	}
	if r.fenced = err == nil; !r.fenced {
		r.failed(c, partRouting, fmt.Errorf("the policy routing rules that refuse what is forwarded to the metadata service are not in place: %w", err))
	} else if written {
		c.written = append(c.written, partRouting)
	}
	c.notes = append(c.notes, notes...)
}

// checkRequired checks the chains that are required, and reports whether the redirect,
// if there is to be one, is in place now.
func (r *Reconciler) checkRequired(ctx context.Context, c *check, status *Status) (redirected bool) {
	err := r.open()
	if status.Mode == AutoMode {
		status.Mode = DNAT
		if err == nil && r.inPlace(desired(r.cfg, Redirect)[1]) {
			status.Mode = Redirect
		}
	}
	if err != nil {
		c.down = append(c.down, partGuard)
		part := partGuard
		if r.cfg.BlockWireserver {
			part = partWireserver
		}
		r.failed(c, part, fmt.Errorf("no iptables rules can be written: %w", err))
		return false
	}
	return r.checkChains(ctx, c, desired(r.cfg, status.Mode))
}

// checkChains checks some chains, and reports whether the redirect, if it is among
// them, is in place now.
func (r *Reconciler) checkChains(ctx context.Context, c *check, chains []chain) (redirected bool) {
	redirected = true
	found := r.kernel.readAll(chains)
	for i, want := range chains {
		standing, err := r.checkChain(ctx, c, want, found[i])
		if want.part == partGuard && !standing {
			c.down = append(c.down, want.part)
		}
		if err != nil {
			redirected = redirected && want.part != partRedirect
			r.failed(c, want.part, fmt.Errorf("%s (chain %s, %s) is not in place: %w", want.purpose, want.name, want.place(), err))
		}
	}
	return redirected
}

// inPlace reports whether a chain and its jump are as they should be.
func (r *Reconciler) inPlace(want chain) bool {
	s, err := r.kernel.read(want)
	return err == nil && s.install(want.rules) == ""
}

// checkChain makes a chain and its jump as they should be, and reports whether they
// were.
func (r *Reconciler) checkChain(ctx context.Context, c *check, want chain, found stateOrError) (standing bool, err error) {
	if found.err != nil {
		return false, found.err
	}
	s, part := found.state, want.part
	if part == partRedirect && strings.Contains(want.rules[0], "-j DNAT") {
		if err := ensureAddress(r.cfg.Address); err != nil {
			return false, err
		}
	}
	if last, ok := r.last[part]; ok && !s.holds(last) {
		c.gone = append(c.gone, part)
		delete(r.last, part)
	}
	change := s.install(want.rules)
	if change != "" {
		if err := r.kernel.apply(ctx, change); err != nil {
			return false, err
		}
		c.written = append(c.written, part)
	}
	r.last[part] = want.rules
	return change == "", nil
}

// logGone says that rules were there and are gone, and what that meant for pods.
func (r *Reconciler) logGone(ctx context.Context, c *check) {
	if len(c.gone) == 0 {
		return
	}
	for _, part := range c.gone {
		r.lost[part].Add(1)
	}
	level := slog.LevelWarn
	if len(r.written) > contested {
		level = slog.LevelDebug
	}
	r.cfg.Logger.Log(ctx, level, "rules were removed or changed by another program", "rules", c.gone, "meanwhile", meanwhile(c.gone, c.down))
}

// meanwhile says what pods may have had while parts were gone and fences down.
func meanwhile(gone, down []string) string {
	var said []string
	switch {
	case slices.Contains(down, partRouting) && slices.Contains(down, partGuard):
		said = append(said, "no fence stood: pods may have reached the metadata service, and been given tokens of the node's identities")
	case slices.Contains(gone, partRedirect):
		said = append(said, "pods' requests for tokens were refused or dropped; a fence stood, and none reached the metadata service")
	case slices.Contains(gone, partRouting) || slices.Contains(gone, partGuard):
		said = append(said, "pods' requests for tokens were served; the other fence stood, and none reached the metadata service")
	}
	for _, tc := range []struct{ part, text string }{
		{partWireserver, "pods may have reached the wireserver"},
		{partInput, "connections to the agent's port that were not redirected were refused by the agent itself"},
		{partAntispoof, "forged packets may have kept the node from the metadata service"},
	} {
		if slices.Contains(gone, tc.part) {
			said = append(said, tc.text)
		}
	}
	return strings.Join(said, "; ")
}

// contested is how often in a minute rules are written for ordinary reasons.
const contested = 5

// contest says so when somebody else keeps changing the rules. They are put back
// at the same pace all the same: each moment without them is one in which pods are
// refused.
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
	return []string{fmt.Sprintf("another program keeps changing the rules: they were put back %d times in the last minute", len(r.written))}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
