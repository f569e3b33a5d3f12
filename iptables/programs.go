package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/iptables/links"
)

// programs are those of mode EBPF.
func (cfg Config) programs() ebpf.Config {
	p := cfg.Programs
	p.Metadata, p.Agent = cfg.Metadata, netip.AddrPortFrom(cfg.Address, cfg.Port)
	return p
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

// TryPrograms says why the programs of mode EBPF cannot be put in place on this node; nil if the kernel
// takes them. It changes nothing. Where this process is in no pod, it is ErrNotInPod, and says no more.
func TryPrograms(cfg Config) error { return ebpf.Try(cfg.programs()) }

// ErrNotInPod is returned by TryPrograms.
var ErrNotInPod = ebpf.ErrNotInPod

// ensurePrograms puts the programs in place, and the address that they lead to.
func (r *Reconciler) ensurePrograms(res *result) {
	if r.programs == nil {
		res.down = append(res.down, partEgress)
		return
	}
	err := ensureAddress(r.cfg.Address)
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
	if r.programs == nil || r.cfg.HostNetworkPods == nil || !r.status.Load().InPlace[partRedirect] {
		return nil
	}
	bound, unbound, known := r.cfg.HostNetworkPods()
	if !known {
		return nil // an agent that starts anew leaves redirected what its predecessor did
	}
	missing, err := r.programs.Bind(bound, unbound)
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

// advise says what to do where rules do not work although mode auto has chosen them, given why
// programs cannot be put in place; nil if they can.
func advise(possible error) error {
	switch {
	case possible == nil:
		return errors.New("mode auto chooses at the start alone: delete the agent's pod, and the next one uses programs in the place of rules (--redirect-mode=ebpf)")
	case errors.Is(possible, ebpf.ErrPrivileges): // the manifest of ebpf gives them with the mounts
		return fmt.Errorf("mode auto would use programs in the place of rules, but the agent lacks what they need: set the chart's value nmi.redirectMode=auto, or ebpf for all nodes, "+
			"or apply deploy/manifests/ebpf/daemonset.yaml: %w", possible)
	default:
		return fmt.Errorf("mode auto cannot use programs in the place of rules either: %w", possible)
	}
}

// LeftPrograms returns an error if programs that an agent in mode EBPF has left redirect connections past
// the rules. It is for the other modes, whose agents have no right to see programs: it looks whether the
// fence among them forbids this process a datagram to the metadata service (EPERM). Bound to lo, that
// leaves the node in no case.
func LeftPrograms(cfg Config) error {
	if _, err := os.Stat(cfg.Programs.Pins); cfg.Programs.Pins != "" && err == nil { // the file system is mounted here
		return fmt.Errorf("%w: they are pinned in %s", errLeftPrograms, cfg.Programs.Pins)
	}
	if forbidden(cfg.Metadata.Addr()) { // without the errno: the agent lacks no right
		return fmt.Errorf("%w: the kernel forbids this process to send to %s", errLeftPrograms, cfg.Metadata.Addr())
	}
	return nil
}

// forbidden reports whether the kernel is known to forbid this process a datagram to an address.
func forbidden(addr netip.Addr) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false // nothing is known
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is to be written
	const discard = 9    // RFC 863
	if err := unix.BindToDevice(fd, "lo"); err != nil {
		return false
	}
	return errors.Is(unix.Sendto(fd, nil, 0, &unix.SockaddrInet4{Port: discard, Addr: addr.As4()}), unix.EPERM)
}

// cleanupPrograms removes the programs. It returns an error if there are still any, where it cannot see
// them or only unpin them.
func cleanupPrograms(pins string) (removed bool, err error) {
	removed, err = ebpf.Cleanup(pins)
	if err != nil {
		return removed, err
	}
	metadata := netip.AddrFrom4([4]byte{169, 254, 169, 254})
	switch {
	case removed && ebpf.Privileges() != nil && !detached(metadata):
		err = fmt.Errorf("another process holds the programs of mode ebpf, for the kernel still forbids this process to send to %s: end it (bpftool link show names it), or run nmi cleanup as root on the node, which detaches them", metadata)
	case !removed && !ebpf.Mounted(pins) && forbidden(metadata):
		err = fmt.Errorf("programs of mode ebpf are left, for the kernel forbids this process to send to %s: mount the node's BPF file system at /host%[2]s or %[2]s, as deploy/cleanup.yaml does", metadata, filepath.Dir(ebpf.DefaultPins))
	}
	return removed, err
}

// detached waits for the kernel to detach what is no longer pinned (bpf_link_put_deferred).
func detached(metadata netip.Addr) bool {
	const attempts, pause = 100, 20 * time.Millisecond
	for range attempts {
		if !forbidden(metadata) {
			return true
		}
		time.Sleep(pause)
	}
	return false
}

var errLeftPrograms = errors.New("programs that an agent in mode ebpf has left send pods' connections past the rules: apply deploy/cleanup.yaml to the node, " +
	"or set the chart's value nmi.redirectMode=auto until they are gone: with it an agent that uses rules may remove them")

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
