package iptables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Inspector looks at the rules of a node, for another process than the one that keeps them in
// place. It changes none; TryWriting leaves none behind.
type Inspector struct {
	Backend Backend
	Reason  string // for the backend

	cfg    Config
	runner *runner
}

// Inspect selects a backend as New does. Its errors say which commands are missing.
func Inspect(cfg Config) (*Inspector, error) {
	backend, reason, err := selectBackend(cfg.Backend)
	if err != nil {
		return nil, err
	}
	run, err := newRunner(backend, new(atomic.Uint64))
	if err != nil {
		return nil, err
	}
	return &Inspector{Backend: backend, Reason: reason, cfg: cfg, runner: run}, nil
}

// Privileges says which capabilities this process lacks to read and write the rules; nil if it
// has them.
func Privileges() error {
	if missing := missingCapabilities(); len(missing) > 0 {
		return permissionAdvice(missing)
	}
	return nil
}

// Part is a part of what Run keeps in place.
type Part struct {
	Name     string // as in logs and metrics
	Required bool   // the agent is not ready without it
	Err      error  // why it is not in place and first; nil if it is
}

// Parts returns the state of each part that the configuration asks for. In ModeAuto either
// redirect will do.
func (i *Inspector) Parts() []Part {
	r := &Reconciler{cfg: i.cfg}
	parts := []Part{{Name: partRouting, Required: r.required(partRouting), Err: routingFenceInPlace(i.cfg)}}
	modes := []Mode{i.cfg.Mode}
	if i.cfg.Mode == ModeAuto {
		modes = []Mode{DNAT, Redirect}
	}
	for n, want := range slices.Concat(desired(i.cfg, modes[0]), hardening(i.cfg, modes[0])) {
		err := i.inPlace(want)
		if want.part == partRedirect && len(modes) > 1 && err != nil && i.inPlace(desired(i.cfg, modes[1])[n]) == nil {
			err = nil
		}
		parts = append(parts, Part{Name: want.part, Required: r.required(want.part), Err: err})
	}
	return parts
}

func (i *Inspector) inPlace(want chain) error {
	s, err := i.runner.read(want)
	if err != nil {
		return err
	}
	if problem := s.problem(want.rules); problem != "" {
		return errors.New(problem)
	}
	if want.part == partRedirect && strings.Contains(want.rules[0], "-j DNAT") {
		return addressInPlace(i.cfg)
	}
	return nil
}

// problem says what keeps the chain from being in place with these rules; "" for nothing.
func (s state) problem(rules []string) string {
	found, inPlace := s.jumps()
	switch {
	case !s.exists:
		return fmt.Sprintf("the table %s has no chain %s", s.table, s.name)
	case !slices.Equal(s.rules, rules):
		return fmt.Sprintf("chain %s of the table %s has other rules: %q, want %q", s.name, s.table, s.rules, rules)
	case len(found) == 0:
		return fmt.Sprintf("nothing jumps to chain %s: want %q, %s", s.name, s.jump(), s.place())
	case len(found) > 1:
		return fmt.Sprintf("chain %s has several jumps: %q", s.name, found)
	case !inPlace:
		return fmt.Sprintf("%q is not %s: %q precedes it", found[0], s.place(), s.hookRules[0])
	}
	return ""
}

// addressInPlace says whether lo has the address that connections are sent to in mode DNAT.
func addressInPlace(cfg Config) error {
	lo, err := findLo()
	if err != nil {
		return err
	}
	addresses, err := netlink.AddrList(lo, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("listing the addresses of lo: %w", err)
	}
	if !slices.ContainsFunc(addresses, func(a netlink.Addr) bool { return a.IP.String() == cfg.Address.String() }) {
		return fmt.Errorf("lo does not have the address %s, which the redirect leads to", cfg.Address)
	}
	return nil
}

func routingFenceInPlace(cfg Config) error {
	rules, err := listRoutingRules()
	if err != nil {
		return err
	}
	var missing []string
	for _, rule := range routingRules(cfg.Metadata.Addr()) {
		if !slices.Contains(rules, rule) {
			missing = append(missing, rule.String())
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing policy routing rules: %s", strings.Join(missing, "; "))
	}
	return nil
}

// TryWriting writes a chain that nothing jumps to, with a rule, and removes it in the same
// transaction. So it fails where the node forbids rules, and leaves nothing behind, however it
// ends; but on a node without any table one stays, which is empty.
func (i *Inspector) TryWriting(ctx context.Context) error {
	const scratch = "nmi-doctor"
	tables, _ := i.Backend.existing() // the write says what is wrong
	table := guardChain.table
	for _, candidate := range []string{"filter", "nat", guardChain.table} { // the last that is there
		if slices.Contains(tables, candidate) {
			table = candidate
		}
	}
	return i.runner.apply(ctx, fmt.Sprintf("*%s\n:%[2]s - [0:0]\n-A %[2]s -j RETURN\n-F %[2]s\n-X %[2]s\nCOMMIT\n", table, scratch))
}

// existing lists the backend's tables.
func (b Backend) existing() (names []string, err error) {
	if b == Legacy {
		return slices.DeleteFunc([]string{"filter", "nat", "mangle", "raw"}, func(table string) bool { return !b.has(table) }), nil
	}
	tables, err := listNFT(nftGetTable, unix.NFPROTO_IPV4)
	for _, table := range tables {
		names = append(names, nftText(table, nftTableName))
	}
	return names, err
}

// Restrictions lists other programs' rules that drop what pods send to the metadata service:
// AKS's IMDS restriction (ensure_imds_restriction.sh of AgentBaker) is one in FORWARD of mangle
// or filter.
func (i *Inspector) Restrictions() (found []string, err error) {
	return i.foreignRules([]string{"mangle", "filter"}, func(chain, rule string) bool {
		return chain == "FORWARD" && (strings.HasSuffix(rule, " -j DROP") || strings.Contains(rule, " -j REJECT"))
	})
}

// foreignRules lists other programs' rules of both backends that name the metadata service's
// address, in the chains that which selects.
func (i *Inspector) foreignRules(tables []string, which func(chain, rule string) bool) (found []string, err error) {
	for _, backend := range installed() {
		for _, table := range tables {
			if !backend.has(table) {
				continue
			}
			rules, err := backend.rules(table)
			if err != nil {
				return nil, err
			}
			for _, rule := range rules {
				chain, _, _ := strings.Cut(strings.TrimPrefix(rule, "-A "), " ")
				if strings.Contains(rule, " "+i.cfg.Metadata.Addr().String()+"/32 ") && !mentionsOwnChain(rule) && which(chain, rule) {
					found = append(found, fmt.Sprintf("iptables-%s -t %s %s", backend, table, rule))
				}
			}
		}
	}
	return found, nil
}

// rules lists all rules of a table, as iptables -S shows them.
func (b Backend) rules(table string) ([]string, error) {
	path, err := b.path()
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd := exec.Command(path, "-t", table, "-S", fmt.Sprintf("--wait=%d", lockWait))
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, toolError("reading the "+table+" table", fmt.Sprintf("%v: %s", err, stderr.String()))
	}
	return rulesIn(strings.Split(string(out), "\n")), nil
}
