package iptables

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/iptables/links"
)

// newPrograms returns the programs of mode EBPF.
func (cfg Config) newPrograms() *ebpf.Programs {
	p := cfg.Programs
	p.Metadata, p.Agent = cfg.Metadata, netip.AddrPortFrom(cfg.Address, cfg.Port)
	return ebpf.New(p)
}

// Caller returns the UID of the pod whose connection the agent has accepted; see
// ebpf.Programs. It is for mode EBPF.
func (r *Reconciler) Caller(conn *net.TCPConn) (uid string, err error) {
	if uid, err = r.programs.Caller(conn); err != nil {
		r.counts.unidentified[unidentifiedBy(err)].Add(1)
	}
	return uid, err
}

// ConnectProgram is what the kernel calls the program of mode EBPF that redirects.
const ConnectProgram = ebpf.ConnectProgram

// ProgramsInPlace says which programs of mode EBPF are not in place; nil if all are.
func ProgramsInPlace(cfg Config) error { return ebpf.InPlace(cfg.Programs.Pins) }

// ensurePrograms puts the programs in place, and the address that they lead to.
func (r *Reconciler) ensurePrograms(res *result) {
	if r.programs == nil {
		res.down = append(res.down, partEgress)
		return
	}
	err := r.ensureTarget()
	if err == nil {
		var found ebpf.Result
		found, err = r.programs.Ensure()
		res.written = append(res.written, partsOf(found.Written)...)
		res.lost = append(res.lost, partsOf(found.Lost)...)
		if slices.Contains(found.Lost, ebpf.Egress) {
			res.down = append(res.down, partEgress)
		}
		res.notes = append(res.notes, found.Notes...)
	}
	for _, part := range []string{partEgress, partRedirect} {
		res.inPlace[part] = err == nil
	}
	if err != nil {
		r.fail(res, partRedirect, fmt.Errorf("the programs that redirect pods' connections are not in place: %w", err))
	}
}

// ensureTarget adds the address that the programs lead to to lo, unless the node has it: it may be
// the node's own.
func (r *Reconciler) ensureTarget() error {
	all, err := netlink.AddrList(nil, unix.AF_INET)
	if err == nil && slices.ContainsFunc(all, func(a netlink.Addr) bool { return a.IP.Equal(r.cfg.Address.AsSlice()) }) {
		return nil
	}
	return ensureAddress(r.cfg.Address)
}

// partsOf returns the parts that hooks belong to.
func partsOf(hooks []string) (parts []string) {
	for _, hook := range hooks {
		part := partRedirect
		if hook == ebpf.Egress {
			part = partEgress
		}
		if !slices.Contains(parts, part) {
			parts = append(parts, part)
		}
	}
	return parts
}

// bindRetry is the pause before a pod without a cgroup is looked for again.
const bindRetry = 100 * time.Millisecond

// bind tells the programs which host-network pods to redirect. The channel delivers when that has
// to be done again, whatever else happens; it is nil if it need not.
func (r *Reconciler) bind() (again <-chan time.Time) {
	if r.programs == nil || r.cfg.Bound == nil || !r.status.Load().InPlace[partRedirect] {
		return nil
	}
	missing, err := r.programs.Bind(r.cfg.Bound())
	if text := errorText(err); text != r.lastBind {
		if r.lastBind = text; err != nil {
			r.cfg.Logger.Error("host-network pods may get the node's identities instead of their own; retrying", "error", err)
		}
	}
	if missing > 0 {
		return time.After(bindRetry)
	}
	return nil
}

// ChooseEBPF reports whether ModeAuto is to be EBPF, and why: rules cannot be written, or would be
// without effect, and programs can be put in place. It changes nothing.
func ChooseEBPF(ctx context.Context, cfg Config) (reason string, ok bool) {
	if ebpf.Possible(cfg.Programs) != nil {
		return "", false
	}
	if err := links.Bypass(); err != nil {
		return err.Error(), true
	}
	if above, err := ebpf.Above(cfg.Programs.CgroupRoot); err == nil && above != "" {
		return fmt.Sprintf("a program on the cgroup %s may rewrite pods' connections before rules see them", above), true
	}
	rules, err := Inspect(cfg)
	if err == nil {
		err = rules.TryWriting(ctx)
	}
	if cause := causeOf(err); err != nil && (cause == CausePermission || cause == CauseMissingTool) {
		return fmt.Sprintf("iptables rules cannot be written: %s", err), true
	}
	return "", false
}
