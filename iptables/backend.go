package iptables

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// Backend is one of the two sets of tables that the kernel has for iptables. A
// rule in one is not seen through the other; both are in force.
type Backend string

// The backends. Auto is the one that the node uses.
const (
	Auto   Backend = "auto"
	NFT    Backend = "nft"
	Legacy Backend = "legacy"
)

// Backends lists the values that ParseBackend takes.
var Backends = []Backend{Auto, NFT, Legacy}

// ParseBackend returns the backend of that name.
func ParseBackend(name string) (Backend, error) {
	if b := Backend(name); slices.Contains(Backends, b) {
		return b, nil
	}
	return "", fmt.Errorf("%q is not an iptables backend: use %q, %q or %q", name, Auto, NFT, Legacy)
}

// path finds the program that works on the backend's tables. Where distributions
// have one alone, it is called iptables, and says in its version which it is.
func (b Backend) path() (string, error) {
	if path, err := exec.LookPath("iptables-" + string(b)); err == nil {
		return path, nil
	}
	path, err := exec.LookPath("iptables")
	if err == nil && defaultBackend() == b {
		return path, nil
	}
	return "", fmt.Errorf("iptables-%s is not on this machine: install the iptables package", b)
}

// defaultBackend is what the plain iptables command works on; "" if there is none.
func defaultBackend() Backend {
	out, err := exec.Command("iptables", "--version").Output()
	switch {
	case err != nil:
		return ""
	case strings.Contains(string(out), "nf_tables"):
		return NFT
	default: // "(legacy)", and versions before 1.8, which do not say
		return Legacy
	}
}

// other is the backend that b is not.
func (b Backend) other() Backend {
	if b == NFT {
		return Legacy
	}
	return NFT
}

// kubeletChains are chains that the kubelet makes for the very purpose of
// telling which backend the node uses (KEP-3178), the older one among them.
var kubeletChains = []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"}

// detect finds out which backend the node uses, and says how: the one with the
// kubelet's chains, else the one with more rules, else the one that the plain
// iptables command is a name for.
func detect() (Backend, string, error) {
	rules := map[Backend]int{}
	available := slices.DeleteFunc([]Backend{NFT, Legacy}, func(b Backend) bool {
		_, err := b.path()
		return err != nil
	})
	if len(available) == 0 {
		return "", "", errors.New("neither iptables-nft nor iptables-legacy is on this machine: install the iptables package")
	}
	for _, b := range available {
		chains, n := survey(b)
		for _, chain := range kubeletChains {
			if slices.Contains(chains, chain) {
				return b, "the kubelet's chain " + chain + " is there", nil
			}
		}
		rules[b] = n
	}
	switch {
	case rules[NFT] > rules[Legacy]:
		return NFT, "it has the node's rules", nil
	case rules[Legacy] > rules[NFT]:
		return Legacy, "it has the node's rules", nil
	}
	// Neither, or as many: what the distribution chose.
	if b := defaultBackend(); slices.Contains(available, b) {
		return b, "it is this machine's default", nil
	}
	return available[0], "the other is not on this machine", nil
}

// survey lists the chains that were made in a backend, and counts its rules
// other than ours. What cannot be read counts as empty.
func survey(b Backend) (chains []string, rules int) {
	path, err := b.path()
	if err != nil {
		return nil, 0
	}
	for _, t := range []string{"mangle", "nat", "filter"} {
		if !b.has(t) {
			continue
		}
		out, err := exec.Command(path, "-t", t, "-S").Output()
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(out)) {
			line = strings.TrimSpace(line)
			if chain, ok := strings.CutPrefix(line, "-N "); ok {
				chains = append(chains, chain)
			} else if strings.HasPrefix(line, "-A ") && !mentionsOurs(line) {
				rules++
			}
		}
	}
	return chains, rules
}

// has reports whether a backend may have a table of that name. Asking
// iptables-legacy itself would load the kernel's modules for it, and so make it.
func (b Backend) has(table string) bool {
	if b != Legacy {
		return true
	}
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	return err == nil && slices.Contains(strings.Fields(string(names)), table)
}
