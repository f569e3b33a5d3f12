package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/podidentity/nmi/cmd/nmi/startuptaint"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

// parsed is a flag that is parsed, and so checked, where it is given. pflag adds the name
// of the flag to errors.
type parsed[T any] struct {
	p     *T
	parse func(text string) (T, error)
	text  string
	list  bool // of values separated by commas; it may be given several times
	given bool
}

// parsedVar adds a flag that is written to p. The default, unless it is "", is written
// there at once.
func parsedVar[T any](fs *pflag.FlagSet, p *T, name, value string, parse func(string) (T, error), usage string) {
	addParsed(fs, &parsed[T]{p: p, parse: parse}, name, value, usage)
}

// listVar is parsedVar for values that are separated by commas, or the flag repeated.
func listVar[T any](fs *pflag.FlagSet, p *T, name, value string, parse func([]string) (T, error), usage string) {
	split := func(text string) (T, error) {
		if strings.TrimSpace(text) == "" {
			return parse(nil)
		}
		values := strings.Split(text, ",")
		for i := range values {
			values[i] = strings.TrimSpace(values[i])
		}
		return parse(values)
	}
	addParsed(fs, &parsed[T]{p: p, parse: split, list: true}, name, value, usage)
}

func addParsed[T any](fs *pflag.FlagSet, v *parsed[T], name, value, usage string) {
	if value != "" {
		if err := v.Set(value); err != nil {
			panic(fmt.Sprintf("default of --%s: %v", name, err))
		}
	}
	v.given = false
	fs.Var(v, name, usage)
}

// Set implements pflag.Value.
func (v *parsed[T]) Set(text string) error {
	if v.list && v.given {
		text = v.text + "," + text
	}
	value, err := v.parse(text)
	if err != nil {
		return err
	}
	*v.p, v.text, v.given = value, text, true
	return nil
}

// String implements pflag.Value.
func (v *parsed[T]) String() string { return v.text }

// Type implements pflag.Value: the word for the value in --help.
func (v *parsed[T]) Type() string {
	if v.list {
		return "list"
	}
	return "value"
}

// verbosity is klog's level, with an error that says what it takes.
type verbosity struct{ pflag.Value }

// Set implements pflag.Value.
func (v verbosity) Set(text string) error {
	if v.Value.Set(text) != nil {
		return fmt.Errorf("want a whole number; from %d on debug messages are logged", debugVerbosity)
	}
	return nil
}

// Type implements pflag.Value.
func (verbosity) Type() string { return "value" }

// Values of --host-network-pods. The first leaves host-network pods to the node.
const (
	hostNetworkNode  = "node"
	hostNetworkBound = "bound"
)

// parseHostNetworkPods returns whether all host-network pods are redirected.
func parseHostNetworkPods(text string) (all bool, err error) {
	switch text {
	case hostNetworkNode:
		return false, nil
	case hostNetworkBound:
		return true, nil
	}
	return false, fmt.Errorf("want %q or %q", hostNetworkNode, hostNetworkBound)
}

// upTo parses numbers from 1.
func upTo(most int) func(string) (int, error) {
	return func(text string) (int, error) {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > most {
			return 0, fmt.Errorf("want a number from 1 to %d", most)
		}
		return n, nil
	}
}

const maxSeconds = 24 * 60 * 60

// parseSeconds parses the number of seconds between two checks of the rules.
func parseSeconds(text string) (time.Duration, error) {
	n, err := upTo(maxSeconds)(text)
	return time.Duration(n) * time.Second, err
}

const (
	maxWait = time.Minute
	// The API server mostly sends something about once a minute; after two thirds of the
	// time it is asked.
	minStaleness = 3 * time.Minute
)

// parseWait parses how long a request may wait.
func parseWait(text string) (time.Duration, error) {
	wait, err := time.ParseDuration(text)
	if err != nil || wait <= 0 || wait > maxWait {
		return 0, fmt.Errorf("want a duration above 0, %s at most, such as 3s", maxWait)
	}
	return wait, nil
}

func parseStaleness(text string) (time.Duration, error) {
	age, err := time.ParseDuration(text)
	if err != nil || age != 0 && age < minStaleness {
		return 0, fmt.Errorf("want 0 to turn it off, or a duration of at least %s, such as 10m", minStaleness)
	}
	return age, nil
}

// parsePortOf parses the port of an address.
func parsePortOf(at *netip.AddrPort) func(string) (netip.AddrPort, error) {
	return func(text string) (netip.AddrPort, error) {
		port, err := upTo(65535)(text)
		return netip.AddrPortFrom(at.Addr(), uint16(port)), err //nolint:gosec // no more than fit
	}
}

// parseAddrOf parses the address of a port.
func parseAddrOf(at *netip.AddrPort, parse func(string) (netip.Addr, error)) func(string) (netip.AddrPort, error) {
	return func(text string) (netip.AddrPort, error) {
		addr, err := parse(text)
		return netip.AddrPortFrom(addr, at.Port()), err
	}
}

// parseBindAddress parses an address to listen on.
func parseBindAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.IsMulticast() || addr.Zone() != "" {
		return netip.Addr{}, errors.New("want an IP address of the node, 127.0.0.1 for the node alone, or 0.0.0.0 for all")
	}
	return addr.Unmap(), nil
}

// parseIPv4 parses an address that pods' packets go to: the kernel drops what comes from
// outside for loopback.
func parseIPv4(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || !addr.Is4() || addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() {
		return netip.Addr{}, errors.New("want an IPv4 address that is not loopback")
	}
	return addr, nil
}

func parseAbsolutePath(text string) (string, error) {
	if text != "" && !filepath.IsAbs(text) {
		return "", errors.New(`want an absolute path, or "" to turn it off`)
	}
	return text, nil
}

// parseRequiredPath is parseAbsolutePath for what cannot be turned off.
func parseRequiredPath(text string) (string, error) {
	if !filepath.IsAbs(text) {
		return "", errors.New("want an absolute path")
	}
	return text, nil
}

func parseStartupTaint(text string) (corev1.Taint, error) {
	if text == "" {
		return corev1.Taint{}, nil
	}
	return startuptaint.Parse(text)
}

// oneOf parses a word.
func oneOf(words ...string) func(string) (string, error) {
	return func(text string) (string, error) {
		if !slices.Contains(words, text) {
			return "", fmt.Errorf("want %s", strings.Join(words, " or "))
		}
		return text, nil
	}
}

// parseOperationMode parses a mode in any case, as the old NMI did.
func parseOperationMode(text string) (podresolver.Mode, error) {
	mode, err := oneOf(string(podresolver.Managed), string(podresolver.Standard))(strings.ToLower(text))
	return podresolver.Mode(mode), err
}

// parseNamespaces returns a list that is not nil: given "", it has no namespace.
func parseNamespaces(names []string) ([]string, error) {
	for _, name := range names {
		if len(validation.IsDNS1123Label(name)) > 0 {
			return nil, fmt.Errorf("%q is not the name of a namespace: want names separated by commas, or \"\" for none", name)
		}
	}
	return append([]string{}, names...), nil
}

// parseUIDs parses users' numbers.
func parseUIDs(texts []string) (uids []uint32, err error) {
	for _, text := range texts {
		uid, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, errors.New(`want user IDs as numbers, separated by commas, or "" to turn it off`)
		}
		uids = append(uids, uint32(uid))
	}
	return uids, nil
}

// parseAuthorities returns the hosts of Entra authorities.
func parseAuthorities(urls []string) (hosts []string, err error) {
	for _, authority := range urls {
		host, err := upstream.ParseAuthority(authority)
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, host)
	}
	return hosts, nil
}

func parseAllowedPaths(paths []string) ([]string, error) {
	for _, path := range paths {
		if !slices.Contains(proxy.AllowablePaths(), path) {
			return nil, fmt.Errorf("%s cannot be allowed: want some of %s", path, strings.Join(proxy.AllowablePaths(), ", "))
		}
	}
	return paths, nil
}
