package iptables

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/podidentity/nmi/iptables/capabilities"
)

// errPrivileges means that this process lacks capabilities that it needs.
var errPrivileges = errors.New("run as root with the capabilities NET_ADMIN and NET_RAW")

// errForbidden is the advice for EPERM with all capabilities. On AKS nodes with eBPF host
// routing an LSM program refuses every rule that is written in the node's network
// namespace (azure-block-iptables of Azure/azure-container-networking).
var errForbidden = errors.New("the node may forbid iptables rules, as AKS nodes with eBPF host routing do (label kubernetes.azure.com/ebpf-host-routing=true): " +
	"there, use --redirect-mode=ebpf (the chart's nmi.redirectMode=ebpf), or none with a local redirect policy of Cilium")

// missingCapabilities names the capabilities that this process needs and lacks. Policy
// routing, iptables-nft and conntrack need NET_ADMIN; iptables-legacy also NET_RAW.
func missingCapabilities() []string {
	return capabilities.Missing(unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
}

// permissionAdvice says what to do about EPERM, given the missing capabilities.
func permissionAdvice(missing []string) error {
	if len(missing) == 0 {
		return errForbidden
	}
	return fmt.Errorf("%w (missing: %s)", errPrivileges, strings.Join(missing, ", "))
}

// explainErrno adds what to do about the error of a system call, where that is known.
func explainErrno(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if missing := missingCapabilities(); len(missing) > 0 {
			return fmt.Errorf("%w: %w", permissionAdvice(missing), err)
		}
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w policy routing (CONFIG_IP_MULTIPLE_TABLES): %w", errKernel, err)
	}
	return err
}

// errKernel means that the kernel has no support for a rule, or has not loaded it. What is
// missing follows.
var errKernel = errors.New("the kernel lacks")

// errNotInstalled means that a command of iptables is missing.
var errNotInstalled = errors.New("not installed: install the iptables package")

// errLocked means that another program holds the xtables lock.
var errLocked = errors.New("another program holds the xtables lock")

// toolError turns the output of a failed iptables into an error that says what to do
// about it. No other function knows these texts.
func toolError(doing, text string) error {
	text = strings.Join(strings.Fields(text), " ")
	switch {
	case strings.Contains(text, "Permission denied"), strings.Contains(text, "Operation not permitted"):
		return fmt.Errorf("%s: %w: %s", doing, permissionAdvice(missingCapabilities()), text)
	case strings.Contains(text, "xtables lock"):
		return fmt.Errorf("%s: %w: %s", doing, errLocked, text)
	case strings.Contains(text, "Couldn't load"), strings.Contains(text, "RULE_APPEND failed (No such file or directory)"),
		strings.Contains(text, "No chain/target/match by that name"):
		return fmt.Errorf("%s: %w a module for the rule (xt_conntrack, ipt_rpfilter, xt_multiport, ...), or iptables an extension: %s", doing, errKernel, text)
	case strings.Contains(text, "Table does not exist"), strings.Contains(text, "do you need to insmod"):
		return fmt.Errorf("%s: %w the table: load iptable_nat, iptable_mangle, iptable_filter, iptable_raw or nf_tables: %s", doing, errKernel, text)
	}
	return fmt.Errorf("%s: %s", doing, text)
}
