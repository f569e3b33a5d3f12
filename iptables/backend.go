package iptables

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
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

// ParseBackend returns the backend of that name.
func ParseBackend(name string) (Backend, error) {
	switch b := Backend(name); b {
	case Auto, NFT, Legacy:
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

// errNoCommands means that this machine has neither backend's commands.
var errNoCommands = errors.New("neither iptables-nft nor iptables-legacy is on this machine: install the iptables package")

// installed lists the backends whose commands this machine has.
func installed() []Backend {
	return slices.DeleteFunc([]Backend{NFT, Legacy}, func(b Backend) bool {
		_, err := b.path()
		return err != nil
	})
}

// detect finds out which backend the node uses, and says how: the one with a chain of
// the kubelet's, else the one with more rules, else the one that the plain iptables
// command is a name for.
func detect() (Backend, string, error) {
	available := installed()
	if len(available) == 0 {
		return "", "", errNoCommands
	}
	rules := map[Backend]int{}
	for _, b := range available {
		k, err := openKernel(b, new(atomic.Uint64))
		if err != nil {
			continue // what cannot be read counts as empty
		}
		if chain := k.kubeletChain(); chain != "" {
			return b, "the kubelet's chain " + chain + " is there", nil
		}
		rules[b] = k.countRules()
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

// kubeletChain returns the chain that the kubelet makes in mangle for the very purpose
// of telling which backend the node uses (KEP-3178), or its predecessor; "" if neither
// is there.
func (k *kernel) kubeletChain() string {
	if !k.backend.has("mangle") {
		return ""
	}
	chains, _ := k.tables.ListChains("mangle")
	for _, chain := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		if slices.Contains(chains, chain) {
			return chain
		}
	}
	return ""
}

// countRules counts the rules of others in the hooks that programs put rules in. Those
// in chains of their own are left out: kube-proxy can have tens of thousands.
func (k *kernel) countRules() (n int) {
	for _, hook := range []chain{
		{table: "nat", hook: "PREROUTING"}, {table: "nat", hook: "POSTROUTING"},
		{table: "filter", hook: "INPUT"}, {table: "filter", hook: "FORWARD"},
	} {
		if !k.backend.has(hook.table) {
			continue
		}
		lines, _ := k.tables.List(hook.table, hook.hook)
		for _, rule := range rulesIn(lines) {
			if !mentionsOurs(rule) {
				n++
			}
		}
	}
	return n
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
