package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Defaults of Config.
const (
	// DefaultCgroupRoot is where systemd mounts the hierarchy.
	DefaultCgroupRoot = "/sys/fs/cgroup"
	// DefaultPins is in the BPF file system that systemd mounts; see FindPins.
	DefaultPins = "/sys/fs/bpf/nmi"
)

// Config says what is redirected and where to. All of it is required, but HostNetworkAll.
type Config struct {
	CgroupRoot string         // where the node's cgroup v2 hierarchy is mounted
	Pins       string         // directory in the BPF file system; Ensure creates it
	Metadata   netip.AddrPort // of the metadata service, IPv4
	Agent      netip.AddrPort // that the agent listens on, IPv4; an address of the node
	// HostNetworkAll redirects the host-network pods, too. Otherwise they reach the metadata
	// service themselves.
	HostNetworkAll bool
}

// Programs are the programs in the kernel. Load, Ensure and Close must not be called at the
// same time; Caller is safe for concurrent use.
type Programs struct {
	cfg Config

	// Used by Ensure only.
	objects *kernelObjects // nil before the programs are loaded
	pods    kubepods       // that they are loaded for
	linked  map[string]bool

	sockets atomic.Pointer[ebpf.Map]
	mu      sync.Mutex                          // guards changes of index
	index   atomic.Pointer[map[cgroupID]string] // pods' UIDs
	tree    atomic.Pointer[string]              // path of the cgroup of all pods
}

// New changes nothing.
func New(cfg Config) *Programs {
	p := &Programs{cfg: cfg, linked: make(map[string]bool)}
	p.index.Store(&map[cgroupID]string{})
	return p
}

// Result is what one Ensure found and did.
type Result struct {
	Written []string // hooks that had no program, or an older one, and have this one's now
	Lost    []string // hooks that an earlier Ensure had left in place, and that were gone
	Notes   []string // what else an operator may want to know, a sentence each
}

// Ensure puts the programs in place. Its errors say what to do.
func (p *Programs) Ensure() (res Result, err error) {
	if err := p.Load(); err != nil {
		return res, err
	}
	if err := addExempt(p.objects.Exempt, p.pods.own); err != nil {
		return res, err
	}
	var all error
	for _, h := range hooks {
		written, err := p.ensureLink(h)
		switch {
		case err != nil:
			all = errors.Join(all, fmt.Errorf("program %s: %w", h.name, err))
		case written:
			res.Written = append(res.Written, h.name)
		}
		if written || err != nil {
			if p.linked[h.name] {
				res.Lost = append(res.Lost, h.name)
			}
		}
		p.linked[h.name] = err == nil
	}
	if all == nil {
		res.Notes = p.preceding()
	}
	return res, all
}

// Load is the part of Ensure that changes nothing for pods: it loads the programs, unless they are
// loaded for the cgroup of all pods that there is now. Then Caller works, whichever agent's
// programs run.
func (p *Programs) Load() error {
	maps := filepath.Join(p.cfg.Pins, mapsDir)
	if p.objects != nil && p.pods.valid() {
		if current, err := p.repin(maps); current || err != nil {
			return err
		}
	}
	spec, pods, err := p.cfg.spec()
	if err != nil {
		return err
	}
	for _, m := range spec.Maps {
		if m.Name != ".rodata" {
			m.Pinning = ebpf.PinByName
		}
	}
	if err := p.makePins(); err != nil {
		return err
	}
	objects := new(kernelObjects)
	if err := spec.LoadAndAssign(objects, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: maps}}); err != nil {
		return fmt.Errorf("loading the programs: %w", explainPins(p.cfg.Pins, err))
	}
	p.Close()
	p.objects, p.pods = objects, pods
	p.tree.Store(&pods.path)
	p.sockets.Store(objects.Sockets)
	return nil
}

// spec returns the programs with this Config in them, and the cgroup that they are for.
func (cfg Config) spec() (spec *ebpf.CollectionSpec, pods kubepods, err error) {
	if pods, err = findKubepods(cfg.CgroupRoot); err != nil {
		return nil, pods, err
	}
	netns, err := netnsCookie()
	if err != nil {
		return nil, pods, err
	}
	if spec, err = loadKernel(); err != nil {
		return nil, pods, err
	}
	metadata, agent := cfg.Metadata.Addr().As4(), cfg.Agent.Addr().As4()
	for name, value := range map[string]any{
		kernelVarMetadataAddr: metadata, kernelVarMetadataPort: networkOrder(cfg.Metadata.Port()),
		kernelVarAgentAddr: agent, kernelVarAgentPort: networkOrder(cfg.Agent.Port()),
		kernelVarKubepodsId: uint64(pods.id), kernelVarHostNetns: netns, kernelVarHostNetworkAll: cfg.HostNetworkAll,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, pods, fmt.Errorf("constant %s: %w", name, err)
		}
	}
	return spec, pods, nil
}

// Close lets go of the programs and maps. They stay in place.
func (p *Programs) Close() {
	if p.objects != nil {
		p.sockets.Store(nil)
		_ = p.objects.Close()
		p.objects = nil
	}
}

// ConnectProgram is the name of the program that redirects.
const ConnectProgram = kernelProgNmiConnect4

// Egress is the hook of the fence, as Result names it; all others are the redirect's.
const Egress = "egress"

// hook is where a program is attached.
type hook struct {
	name    string // of the pinned link
	attach  ebpf.AttachType
	program func(*kernelObjects) *ebpf.Program
}

// hooks lists them in the order in which they are put in place: what protects before what
// serves, and nothing is redirected before its caller is recorded.
var hooks = []hook{
	{Egress, ebpf.AttachCGroupInetEgress, func(o *kernelObjects) *ebpf.Program { return o.NmiEgress }},
	{"sock_ops", ebpf.AttachCGroupSockOps, func(o *kernelObjects) *ebpf.Program { return o.NmiSockOps }},
	{"connect6", ebpf.AttachCGroupInet6Connect, func(o *kernelObjects) *ebpf.Program { return o.NmiConnect6 }},
	{"connect4", ebpf.AttachCGroupInet4Connect, func(o *kernelObjects) *ebpf.Program { return o.NmiConnect4 }},
}

// ensureLink makes a hook's pinned link one of our program to the cgroup of all pods, and
// reports whether it was another one.
func (p *Programs) ensureLink(h hook) (written bool, err error) {
	program := h.program(p.objects)
	pin := filepath.Join(p.cfg.Pins, linksDir, h.name)
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return true, p.attach(h, program, pin)
	}
	if err != nil {
		return false, fmt.Errorf("pinned link %s: %w", pin, explain(err))
	}
	defer l.Close() //nolint:errcheck // nothing was written
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	// The kernel detaches a link from a cgroup that is removed; its ID is then 0.
	if cgroup := info.Cgroup(); cgroup == nil || cgroupID(cgroup.CgroupId) != p.pods.id {
		return true, p.attach(h, program, pin)
	}
	own, err := program.Info()
	if err != nil {
		return false, err
	}
	if id, _ := own.ID(); id == info.Program {
		return false, nil
	}
	return true, explain(l.Update(program))
}

// attach makes a link and pins it, in the place of one that there may be.
func (p *Programs) attach(h hook, program *ebpf.Program, pin string) error {
	dir, err := p.pods.open()
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	// Not AttachCgroup, which on old kernels attaches without a link.
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: program, Attach: h.attach})
	if err != nil {
		return explainAttach(err, p.pods.path)
	}
	defer l.Close()           //nolint:errcheck // nothing was written
	temporary := pin + "_new" // this file system allows no dots (bpf_lookup)
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return explainPins(p.cfg.Pins, err)
	}
	if err := l.Pin(temporary); err != nil {
		return fmt.Errorf("pinning: %w", explainPins(p.cfg.Pins, err))
	}
	return explainPins(p.cfg.Pins, os.Rename(temporary, pin))
}

// preceding says which hooks have another program on the same cgroup that runs before ours: of
// links to one cgroup the first that was attached does. One that rewrites the address hides
// it from ours.
func (p *Programs) preceding() (notes []string) {
	dir, err := p.pods.open()
	if err != nil {
		return nil // the next Ensure says so
	}
	defer dir.Close() //nolint:errcheck // nothing was written
	for _, h := range hooks {
		own, err := h.program(p.objects).Info()
		if err != nil {
			continue
		}
		id, _ := own.ID()
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: h.attach})
		if err != nil || len(found.Programs) == 0 || found.Programs[0].ID == id {
			continue
		}
		if slices.ContainsFunc(found.Programs, func(a link.AttachedProgram) bool { return a.ID == id }) {
			notes = append(notes, fmt.Sprintf("another program (ID %d, see bpftool prog show) is attached to %s before the agent's %s, and may hide connections to the metadata service from it: restart that program's owner, so that it attaches again, or remove it", found.Programs[0].ID, p.pods.path, h.name))
		}
	}
	return notes
}

// networkOrder is a port as it is in packets.
func networkOrder(port uint16) [2]byte { return [2]byte{byte(port >> 8), byte(port)} }
