package iptables

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
)

// Backend is one of the kernel's two sets of iptables tables. The rules of both are in
// force, and the commands of one do not show those of the other.
type Backend string

// The backends. BackendAuto selects the one that the node uses.
const (
	BackendAuto Backend = "auto"
	NFT         Backend = "nft"
	Legacy      Backend = "legacy"
)

// ParseBackend returns the backend of that name.
func ParseBackend(name string) (Backend, error) {
	switch b := Backend(name); b {
	case BackendAuto, NFT, Legacy:
		return b, nil
	}
	return "", fmt.Errorf("%q is not an iptables backend: use %q, %q or %q", name, BackendAuto, NFT, Legacy)
}

// path finds the backend's command. Distributions that have only one backend call it
// iptables; its version says which backend it is.
func (b Backend) path() (string, error) {
	if path, err := exec.LookPath("iptables-" + string(b)); err == nil {
		return path, nil
	}
	path, err := exec.LookPath("iptables")
	if err == nil && defaultBackend() == b {
		return path, nil
	}
	return "", fmt.Errorf("iptables-%s is %w", b, errNotInstalled)
}

// defaultBackend returns the backend of the command iptables; "" without the command.
func defaultBackend() Backend {
	out, err := exec.Command("iptables", "--version").Output()
	switch {
	case err != nil:
		return ""
	case strings.Contains(string(out), "nf_tables"):
		return NFT
	default: // "(legacy)", or a version before 1.8
		return Legacy
	}
}

// other returns the other backend.
func (b Backend) other() Backend {
	if b == NFT {
		return Legacy
	}
	return NFT
}

// errNoCommands means that neither backend's commands are installed.
var errNoCommands = fmt.Errorf("iptables-nft and iptables-legacy are %w", errNotInstalled)

// installed lists the backends whose commands are installed.
func installed() []Backend {
	return slices.DeleteFunc([]Backend{NFT, Legacy}, func(b Backend) bool {
		_, err := b.path()
		return err != nil
	})
}

// selectBackend returns the backend that was configured, or else the one that the node uses,
// and the reason.
func selectBackend(configured Backend) (Backend, string, error) {
	if configured == BackendAuto || configured == "" {
		return detect()
	}
	return configured, reasonFlag, nil
}

// detect returns the backend that the node uses, and the reason: the one in which the
// kubelet has a chain, else the one with more rules, else that of the command iptables.
func detect() (Backend, string, error) {
	available := installed()
	if len(available) == 0 {
		return "", "", errNoCommands
	}
	rules := map[Backend]int{}
	for _, b := range available {
		run, err := newRunner(b, new(atomic.Uint64))
		if err != nil {
			continue // counts as empty
		}
		if chain := run.kubeletChain(); chain != "" {
			return b, "it has the kubelet's chain " + chain, nil
		}
		rules[b] = run.countRules()
	}
	switch {
	case rules[NFT] > rules[Legacy]:
		return NFT, "it has more rules", nil
	case rules[Legacy] > rules[NFT]:
		return Legacy, "it has more rules", nil
	}
	if b := defaultBackend(); slices.Contains(available, b) {
		return b, "it is the default of the command iptables", nil
	}
	return available[0], "the other is not installed", nil
}

// kubeletChain returns the chain in mangle by which the kubelet tells others which
// backend the node uses (KEP-3178), or its predecessor; "" without either.
func (r *runner) kubeletChain() string {
	if !r.backend.has("mangle") {
		return ""
	}
	chains, _ := r.tables.ListChains("mangle")
	for _, chain := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		if slices.Contains(chains, chain) {
			return chain
		}
	}
	return ""
}

// countRules counts the rules of other programs in the usual hooks. Those in chains are
// not counted: kube-proxy can have tens of thousands.
func (r *runner) countRules() (n int) {
	for _, hook := range []struct{ table, name string }{
		{"nat", "PREROUTING"}, {"nat", "POSTROUTING"}, {"filter", "INPUT"}, {"filter", "FORWARD"},
	} {
		if !r.backend.has(hook.table) {
			continue
		}
		lines, _ := r.tables.List(hook.table, hook.name)
		for _, rule := range rulesIn(lines) {
			if !mentionsOwnChain(rule) {
				n++
			}
		}
	}
	return n
}

// has reports whether a backend may have a table. The command iptables-legacy would
// load the kernel's module for the table, and so create it.
func (b Backend) has(table string) bool {
	if b != Legacy {
		return true
	}
	names, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	return err == nil && slices.Contains(strings.Fields(string(names)), table)
}
