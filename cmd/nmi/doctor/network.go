package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/links"
)

func (d *doctor) networkChecks() []check {
	checks := []check{
		{"interfaces", "the redirect mode works on the pods' interfaces", d.interfaces},
		{"arp-spoofing", "pods cannot take each other's addresses", d.spoofing},
		{"dataplane", "pods' packets pass iptables", d.dataplane},
	}
	if d.settings.Rules.Mode == iptables.EBPF {
		checks = append(checks, check{"raw-packets", "no pod can send packets past the fences", d.rawPackets})
	}
	return checks
}

func (d *doctor) interfaces(ctx context.Context) (string, error) {
	mode := d.settings.Rules.Mode
	switch mode {
	case iptables.None:
		return "", skipf("--redirect-mode=none: another program redirects")
	case iptables.EBPF:
		return "--redirect-mode=ebpf works on any", nil
	}
	pods, err := d.cluster.podAddresses(ctx)
	if err != nil {
		return "", err
	}
	suitable, reason := iptables.ModeFor(pods)
	switch {
	case suitable == iptables.ModeAuto:
		return "", skipf("%s", reason)
	case mode == iptables.ModeAuto && d.redirects():
		mode = iptables.Redirect // as the agent found it
	}
	if mode == iptables.Redirect && suitable == iptables.DNAT {
		return "", fmt.Errorf("the redirect is that of mode redirect, and pods need mode dnat: %s. The kernel drops what is redirected there: use --redirect-mode=auto or dnat", reason)
	}
	return fmt.Sprintf("--redirect-mode=%s, and %s", d.settings.Rules.Mode, reason), nil
}

// redirects reports whether the redirect that is in place is that of mode redirect.
func (d *doctor) redirects() bool {
	cfg := d.settings.Rules
	cfg.Mode = iptables.Redirect
	i, err := iptables.Inspect(cfg)
	if err != nil {
		return false
	}
	for _, part := range i.Parts() {
		if part.Name == "redirect" {
			return part.Err == nil
		}
	}
	return false
}

func (d *doctor) spoofing(ctx context.Context) (string, error) {
	pods, err := d.cluster.podAddresses(ctx)
	if err != nil {
		return "", err
	}
	if len(pods) == 0 {
		return "", skipf("the node has no pods with addresses of their own")
	}
	unguarded, pinned := links.SharedLinks(pods)
	switch {
	case len(unguarded) > 0 && d.settings.AllowUnguarded:
		return "", warnf("pods on %s can take each other's addresses, and with them identities (CVE-2021-1677): tokens are handed out all the same, by --allow-network-plugin-kubenet", strings.Join(unguarded, ", "))
	case len(unguarded) > 0:
		return "", fmt.Errorf("pods on %s can take each other's addresses by ARP (CVE-2021-1677), and the agent hands out no tokens: use a network plugin that gives each pod its own link, or drop NET_RAW and NET_ADMIN from all pods and set --allow-network-plugin-kubenet", strings.Join(unguarded, ", "))
	case len(pinned) > 0:
		return "", warnf("pods share %s. Their addresses are pinned there, but pods with NET_RAW or NET_ADMIN can take over hardware addresses: drop these capabilities from pods", strings.Join(pinned, ", "))
	}
	return "each has a link of its own", nil
}

func (d *doctor) dataplane(context.Context) (string, error) {
	err := links.Bypass()
	switch mode := d.settings.Rules.Mode; {
	case err == nil:
		return "", nil
	case mode == iptables.None, mode == iptables.EBPF:
		return fmt.Sprintf("they need not, with --redirect-mode=%s", mode), nil
	case errors.Is(err, unix.EPERM):
		return "", skipf("needs more capabilities than the agent has: %s", err)
	case mode != iptables.ModeAuto:
		return "", warnf("%w: --redirect-mode=%s works only if Cilium routes through iptables here (legacy host routing)", err, mode)
	}
	return "", fmt.Errorf("%w: use --redirect-mode=ebpf, or none with a local redirect policy (deploy/cilium), or, if you know that Cilium routes through iptables here (legacy host routing), --redirect-mode=dnat", err)
}
