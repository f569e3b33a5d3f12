package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/iptables"
)

func (d *doctor) ruleChecks() []check {
	checks := []check{
		{"privileges", "this process may write rules", d.privileges},
		{"backend", "iptables is installed", d.backend},
		{"writable", "the node admits iptables rules", d.writable},
	}
	switch {
	case !d.cfg.Pre:
		checks = append(checks, d.partChecks()...)
	case d.settings.Rules.Mode == iptables.EBPF:
		checks = append(checks, check{"programs", "the kernel takes the programs of --redirect-mode=ebpf", d.tryPrograms})
	}
	return append(checks,
		check{"earlier-rules", "no rule of another program comes before the redirect", d.earlier},
		check{"imds-restriction", "what refuses pods before there is an agent (AKS's IMDS restriction)", d.restriction},
	)
}

// chooseMode does for mode auto what an agent does at its start.
func (d *doctor) chooseMode(ctx context.Context) {
	if d.settings.Rules.Mode != iptables.ModeAuto {
		return
	}
	if reason, ok := iptables.ChooseEBPF(ctx, d.settings.Rules); ok {
		d.settings.Rules.Mode, d.chosen = iptables.EBPF, reason
	}
}

func (d *doctor) privileges(context.Context) (string, error) {
	if err := iptables.Privileges(); err != nil {
		return "", err
	}
	return "it is root with NET_ADMIN and NET_RAW", nil
}

// inspect returns the node's rules, or why they cannot be seen.
func (d *doctor) inspect() (*iptables.Inspector, error) {
	if err := iptables.Privileges(); err != nil {
		return nil, skipf("needs privileges: %s", err)
	}
	if d.inspector == nil {
		i, err := iptables.Inspect(d.settings.Rules)
		if err != nil {
			return nil, err
		}
		d.inspector = i
	}
	return d.inspector, nil
}

// usable is inspect for checks that do not repeat why iptables is not usable.
func (d *doctor) usable() (*iptables.Inspector, error) {
	i, err := d.inspect()
	if _, ok := errors.AsType[skipped](err); err != nil && !ok {
		return nil, skipf("iptables is not usable")
	}
	return i, err
}

func (d *doctor) backend(context.Context) (string, error) {
	i, err := d.inspect()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("the backend is %s: %s", i.Backend, i.Reason), nil
}

// writable tries, since no file says whether an LSM program refuses rules.
func (d *doctor) writable(ctx context.Context) (string, error) {
	i, err := d.usable()
	if err != nil {
		return "", err
	}
	err = i.TryWriting(ctx)
	if mode := d.settings.Rules.Mode; err != nil && (mode == iptables.None || mode == iptables.EBPF) {
		return "", warnf("the fences of --redirect-mode=%s that are rules cannot be written: %w", mode, err)
	}
	return "", err
}

// parts are the checks' words for the agent's parts of the rules. The names are those of
// metrics and logs.
var parts = map[string]check{
	"routing":    {anchor: "routing", description: "the routing fence is in place"},
	"guard":      {anchor: "guard", description: "the guard chain is in place and first"},
	"redirect":   {anchor: "redirect", description: "the redirect is in place and first"},
	"wireserver": {anchor: "wireserver", description: "the wireserver is blocked (--block-wireserver)"},
	"input":      {anchor: "input", description: "connections that were not redirected are dropped"},
	"antispoof":  {anchor: "antispoof", description: "forged packets of the metadata service are dropped"},
}

func (d *doctor) partChecks() (checks []check) {
	names := []string{"routing", "guard"}
	rules := d.settings.Rules.Mode != iptables.None && d.settings.Rules.Mode != iptables.EBPF
	if rules {
		names = append(names, "redirect")
	}
	if d.settings.Rules.BlockWireserver {
		names = append(names, "wireserver")
	}
	if rules {
		names = append(names, "input")
	}
	if d.settings.Rules.Mode == iptables.EBPF {
		checks = append(checks, check{"programs", "the programs of --redirect-mode=ebpf are in place", func(context.Context) (string, error) {
			return "", iptables.ProgramsInPlace(d.settings.Rules)
		}})
	} else {
		checks = append(checks, check{"programs", "no programs of --redirect-mode=ebpf are left", func(context.Context) (string, error) {
			return "", iptables.LeftPrograms(d.settings.Rules)
		}})
	}
	for _, name := range append(names, "antispoof") {
		c := parts[name]
		c.run = func(context.Context) (string, error) { return "", d.part(name) }
		checks = append(checks, c)
	}
	return checks
}

func (d *doctor) tryPrograms(context.Context) (found string, err error) {
	if d.chosen != "" {
		found = "--redirect-mode=auto chooses them here, since " + d.chosen
	}
	err = iptables.TryPrograms(d.settings.Rules)
	if errors.Is(err, iptables.ErrNotInPod) {
		err = skipf("this can be tried only in a pod: %s", err)
	}
	return found, err
}

func (d *doctor) part(name string) error {
	i, err := d.usable()
	if err != nil {
		return err
	}
	for _, part := range i.Parts() {
		switch {
		case part.Name != name || part.Err == nil:
		case part.Required:
			return part.Err
		default:
			return warning{part.Err}
		}
	}
	return nil
}

func (d *doctor) earlier(context.Context) (string, error) {
	i, err := d.usable()
	if err != nil {
		return "", err
	}
	found, err := i.Earlier()
	if err != nil {
		return "", err
	}
	if len(found) > 0 {
		return "", warnf("these may send pods' requests elsewhere, or drop them:\n%s", strings.Join(found, "\n"))
	}
	return "", nil
}

func (d *doctor) restriction(context.Context) (string, error) {
	i, err := d.usable()
	if err != nil {
		return "", err
	}
	found, err := i.Restrictions()
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", skipf("nothing: pods reach the metadata service until the first agent's fences")
	}
	return strings.Join(slices.Compact(found), "; "), nil
}
