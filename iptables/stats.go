package iptables

import (
	"errors"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/ebpf"
)

// Cause is why a part of the rules could not be read or written.
type Cause int

// The causes. Each error says more, and what to do.
const (
	CausePermission  Cause = iota // the agent lacks a capability, or the node forbids rules
	CauseMissingTool              // iptables is not installed
	CauseLock                     // another program holds the xtables lock
	CauseKernel                   // the kernel lacks a module or a table
	CauseOther
	causes = iota
)

// String names the cause as metrics do.
func (c Cause) String() string {
	return [...]string{
		CausePermission: "permission", CauseMissingTool: "missing_tool", CauseLock: "lock", CauseKernel: "kernel", CauseOther: "other",
	}[c]
}

// causeOf returns the cause of a part's error.
func causeOf(err error) Cause {
	is := func(any ...error) bool {
		return slices.ContainsFunc(any, func(target error) bool { return errors.Is(err, target) })
	}
	switch {
	case is(errPrivileges, errForbidden, unix.EPERM, unix.EACCES):
		return CausePermission
	case is(errNotInstalled):
		return CauseMissingTool
	case is(errLocked):
		return CauseLock
	case is(errKernel):
		return CauseKernel
	default:
		return CauseOther
	}
}

// Unidentified is why Caller did not find the caller of a connection.
type Unidentified int

// The reasons.
const (
	// NotRedirected means that the programs have no note of the connection: no pod of the node
	// made it, or it was forged, or the kernel had no memory for the note.
	NotRedirected Unidentified = iota
	NoPod                      // the caller's cgroup is no pod's, or no longer one
	LookupFailed
	unidentifiedReasons = iota
)

// String names the reason as metrics do.
func (u Unidentified) String() string {
	return [...]string{NotRedirected: "not_redirected", NoPod: "no_pod", LookupFailed: "error"}[u]
}

// unidentifiedBy returns the reason for an error of Caller.
func unidentifiedBy(err error) Unidentified {
	switch {
	case errors.Is(err, ebpf.ErrNotRedirected):
		return NotRedirected
	case errors.Is(err, ebpf.ErrNoPod):
		return NoPod
	default:
		return LookupFailed
	}
}

// counts is what Stats returns.
type counts struct {
	checks, repairs, staleFlows, contended atomic.Uint64

	lost         [len(parts)]atomic.Uint64
	errors       [causes]atomic.Uint64
	unidentified [unidentifiedReasons]atomic.Uint64
}

// Stats are counts since New.
type Stats struct {
	Checks        uint64            // of the rules
	Repairs       uint64            // checks that wrote missing or changed rules, the first included
	Lost          map[string]uint64 // by part, times that it had been in place and was gone
	Errors        [causes]uint64    // by Cause, times that a part could not be read or written
	LockContended uint64            // commands that found the xtables lock held by another program
	StaleFlows    uint64            // connections past the agent that were ended
	// Unidentified are connections whose caller Caller did not find, by the reason.
	Unidentified [unidentifiedReasons]uint64
}

// Stats returns the counts so far.
func (r *Reconciler) Stats() Stats {
	c := &r.counts
	s := Stats{
		Checks: c.checks.Load(), Repairs: c.repairs.Load(), StaleFlows: c.staleFlows.Load(), LockContended: c.contended.Load(),
		Lost: make(map[string]uint64, len(parts)),
	}
	for i, part := range parts {
		s.Lost[part] = c.lost[i].Load()
	}
	for cause := range c.errors {
		s.Errors[cause] = c.errors[cause].Load()
	}
	for reason := range c.unidentified {
		s.Unidentified[reason] = c.unidentified[reason].Load()
	}
	return s
}

func (c *counts) addLost(part string) { c.lost[slices.Index(parts[:], part)].Add(1) }
