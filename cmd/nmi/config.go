package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
)

// config is what the flags come to, validated.
type config struct {
	node               string
	metadata           netip.AddrPort
	pods               endpoint // where redirected connections arrive
	probes             endpoint
	metrics            endpoint
	mode               iptables.Mode
	address            netip.Addr
	backend            iptables.Backend
	interval           time.Duration
	blockInstance      bool
	instanceNamespaces []string
	headerOptional     bool
	userAgent          string
	authorities        []string // hosts, see upstream.Config

	blockWireserver bool
	allowUnguarded  bool
	handoverDir     string // "" for none
	probeSocket     string // "" for none

	tokensPerSecond int
	tokensAtOnce    int

	maxConnections, maxConnectionsPerPod int

	hostTokenUIDs []uint32
	allow         []string

	resolving podresolver.Config
}

// Names of the flags that choose ports, and of those that choose their addresses.
const (
	flagPort           = "nmi-port"
	flagProbePort      = "http-probe-port"
	flagPrometheusPort = "prometheus-port"

	flagProbeAddress   = "http-probe-address"
	flagMetricsAddress = "metrics-address"
)

// endpoint is an address and port to listen on, and the name of the flag that
// chooses the port.
type endpoint struct {
	flag string
	addr netip.AddrPort
}

// warn logs what was chosen at the operator's own risk.
func (c config) warn(log *slog.Logger) {
	if c.headerOptional {
		log.Warn(`the header "Metadata: true" is not asked for: pods that fetch URLs for others can be made to fetch tokens`)
	}
	if c.resolving.MICNamespace != "" && c.resolving.Mode == podresolver.Managed {
		log.Warn("--MICNamespace is ignored in managed mode, which has no MIC: pods that look like MIC's are not excepted", "namespace", c.resolving.MICNamespace)
	}
	if denied := c.resolving.Deny; len(denied.ResourceIDs) > len(denied.ClientIDs) {
		log.Warn("--deny-identity has more resource IDs than client IDs: an AzureIdentity that names an identity by its client ID alone is not recognised by a resource ID; give the client IDs as well",
			"client_ids", len(denied.ClientIDs), "resource_ids", len(denied.ResourceIDs))
	}
}

const (
	maxIntervalSeconds = 24 * 60 * 60
	maxWait            = time.Minute
	maxTokenRate       = 1000
	maxConnections     = 1_000_000
	// The API server mostly sends something about once a minute; after two thirds of the time
	// it is asked.
	minStaleness = 3 * time.Minute
)

// config validates the options. Its error names the flag and says what it takes.
func (o *options) config() (config, error) {
	cfg := config{
		node:            o.node,
		interval:        time.Duration(o.intervalSeconds) * time.Second,
		blockInstance:   o.blockInstanceMetadata,
		headerOptional:  !o.headerRequired,
		blockWireserver: o.blockWireserver,
		allowUnguarded:  o.allowKubenet, handoverDir: o.handoverDir, probeSocket: o.probeSocket,
		tokensPerSecond: o.tokensPerSecond, tokensAtOnce: o.tokensAtOnce,
		maxConnections: o.maxConnections, maxConnectionsPerPod: o.maxConnectionsPerPod,
		userAgent: strings.TrimSpace("nmi/" + version + " " + o.userAgent),
	}
	if cfg.node == "" {
		return config{}, errors.New("--node is required: the name of the node that the agent runs on (in a DaemonSet, $(NODE_NAME) from the field spec.nodeName)")
	}
	var err error
	if cfg.resolving, err = o.resolving(cfg.node); err != nil {
		return config{}, err
	}
	cfg.resolving.PodWait, cfg.resolving.IdentityWait, cfg.resolving.MaxStaleness = o.podWait, o.identityWait, o.maxStaleness
	for name, wait := range map[string]time.Duration{"pod-wait": o.podWait, "identity-wait": o.identityWait} {
		if wait <= 0 || wait > maxWait {
			return config{}, fmt.Errorf("--%s=%s is not usable: use more than 0s, at most %s", name, wait, maxWait)
		}
	}
	if o.maxStaleness != 0 && o.maxStaleness < minStaleness {
		return config{}, fmt.Errorf("--max-staleness=%s is not usable: use 0 to turn it off, or at least %s", o.maxStaleness, minStaleness)
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return config{}, fmt.Errorf(`--log-format=%s is unknown: use "text" or "json"`, o.logFormat)
	}
	if o.intervalSeconds < 1 || o.intervalSeconds > maxIntervalSeconds {
		return config{}, fmt.Errorf("--ipt-update-interval-sec=%d is not usable: use 1 to %d", o.intervalSeconds, maxIntervalSeconds)
	}
	if o.metadataPort == 0 {
		return config{}, errors.New("--metadata-port=0 is not a port: use 1 to 65535")
	}
	if err = o.endpoints(&cfg); err != nil {
		return config{}, err
	}
	if cfg.handoverDir != "" && !filepath.IsAbs(cfg.handoverDir) {
		return config{}, fmt.Errorf("--handover-dir=%s is not usable: give an absolute path, or nothing to turn it off", cfg.handoverDir)
	}
	if cfg.probeSocket != "" && !filepath.IsAbs(cfg.probeSocket) {
		return config{}, fmt.Errorf("--%s=%s is not usable: give an absolute path, or nothing to turn it off", flagProbeSocket, cfg.probeSocket)
	}
	for _, flag := range []struct {
		name    string
		n, most int
	}{
		{"imds-token-rate", o.tokensPerSecond, maxTokenRate},
		{"imds-token-concurrency", o.tokensAtOnce, maxTokenRate},
		{"max-connections", o.maxConnections, maxConnections},
		{"max-connections-per-pod", o.maxConnectionsPerPod, maxConnections},
	} {
		if flag.n < 1 || flag.n > flag.most {
			return config{}, fmt.Errorf("--%s=%d is not usable: give a number from 1 to %d", flag.name, flag.n, flag.most)
		}
	}
	for _, path := range o.allow {
		if !slices.Contains(proxy.Sensitive, path) {
			return config{}, fmt.Errorf("--allow-path=%s is not one that can be allowed: use %s", path, strings.Join(proxy.Sensitive, ", "))
		}
		cfg.allow = append(cfg.allow, path)
	}
	if cfg.instanceNamespaces, err = parseNamespaces(flagInstanceNamespaces, o.instanceNamespaces); err != nil {
		return config{}, err
	}
	if len(cfg.instanceNamespaces) > 0 && !cfg.blockInstance {
		return config{}, fmt.Errorf("--%s limits nothing without --block-instance-metadata: give both, or neither", flagInstanceNamespaces)
	}
	if cfg.hostTokenUIDs, err = parseUIDs(o.hostTokenUIDs); err != nil {
		return config{}, err
	}
	metadata, err := parseIPv4("metadata-ip", o.metadataIP)
	if err != nil {
		return config{}, err
	}
	cfg.metadata = netip.AddrPortFrom(metadata, o.metadataPort)
	if cfg.authorities, err = parseAuthorities(o.authorities); err != nil {
		return config{}, err
	}
	if cfg.mode, err = iptables.ParseMode(o.redirectMode); err != nil {
		return config{}, fmt.Errorf("--redirect-mode: %w", err)
	}
	if cfg.backend, err = iptables.ParseBackend(o.backend); err != nil {
		return config{}, fmt.Errorf("--iptables-backend: %w", err)
	}
	if cfg.address, err = parseIPv4("redirect-address", o.redirectAddress); err != nil {
		return config{}, err
	}
	if cfg.address == metadata {
		return config{}, fmt.Errorf("--redirect-address=%s is the metadata service's own address: choose another", cfg.address)
	}
	return cfg, nil
}

// endpoints sets what the flags of ports and their addresses come to.
func (o *options) endpoints(cfg *config) error {
	// On all addresses, since a redirected connection comes to whichever the mode
	// says, and the mode may change.
	all := netip.IPv4Unspecified()
	probeAddress, err := parseBindAddress(flagProbeAddress, o.probeAddress)
	if err != nil {
		return err
	}
	metricsAddress, err := parseBindAddress(flagMetricsAddress, o.metricsAddress)
	if err != nil {
		return err
	}
	cfg.pods = endpoint{flagPort, netip.AddrPortFrom(all, o.port)}
	cfg.probes = endpoint{flagProbePort, netip.AddrPortFrom(probeAddress, o.probePort)}
	cfg.metrics = endpoint{flagPrometheusPort, netip.AddrPortFrom(metricsAddress, o.prometheusPort)}
	taken := map[uint16]string{}
	for _, e := range []endpoint{cfg.pods, cfg.probes, cfg.metrics} {
		port := e.addr.Port()
		if port == 0 {
			return fmt.Errorf("--%s=0 is not a port: use 1 to 65535", e.flag)
		}
		if other := taken[port]; other != "" {
			return fmt.Errorf("--%s and --%s are both %d: choose two", other, e.flag, port)
		}
		taken[port] = e.flag
	}
	return nil
}

// parseBindAddress reads the address that a flag gives to listen on.
func parseBindAddress(name, text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.IsMulticast() || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("--%s=%s is not usable: give an IP address of the node, 127.0.0.1 for the node alone, or 0.0.0.0 for all", name, text)
	}
	return addr.Unmap(), nil
}

// resolving is what the flags of addResolving come to.
func (o *options) resolving(node string) (podresolver.Config, error) {
	mode := podresolver.Mode(strings.ToLower(o.operationMode))
	if mode != podresolver.Managed && mode != podresolver.Standard {
		return podresolver.Config{}, fmt.Errorf(`--operation-mode=%s is unknown: use "managed" or "standard"`, o.operationMode)
	}
	deny, err := podresolver.ParseDenyList(o.denyIdentities)
	if err != nil {
		return podresolver.Config{}, fmt.Errorf("--%s: %w", podresolver.DenyIdentityFlag, err)
	}
	exceptions, err := parseNamespaces(podresolver.ExceptionNamespacesFlag, o.exceptionNamespaces)
	if err != nil {
		return podresolver.Config{}, err
	}
	return podresolver.Config{
		Node: node, Mode: mode, Namespaced: o.forceNamespaced, MICNamespace: o.micNamespace, StrictSelection: o.strictSelection,
		Deny: deny, ExceptionNamespaces: exceptions,
	}, nil
}

// parseNamespaces reads the names given to a flag; nil stays nil.
func parseNamespaces(flag string, names []string) ([]string, error) {
	if names == nil {
		return nil, nil
	}
	namespaces := make([]string, 0, len(names))
	for _, name := range names {
		name = strings.TrimSpace(name)
		if len(validation.IsDNS1123Label(name)) > 0 {
			return nil, fmt.Errorf("--%s: %q is not the name of a namespace: give names separated by commas, or \"\" for none", flag, name)
		}
		namespaces = append(namespaces, name)
	}
	return namespaces, nil
}

// parseUIDs reads --host-token-uids.
func parseUIDs(text string) (uids []uint32, err error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	for field := range strings.SplitSeq(text, ",") {
		uid, err := strconv.ParseUint(strings.TrimSpace(field), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("--host-token-uids=%s is not usable: give user IDs as numbers, separated by commas, or nothing to turn it off", text)
		}
		uids = append(uids, uint32(uid))
	}
	return uids, nil
}

// parseIPv4 reads the address given to a flag. Loopback is no use to either
// flag: the kernel drops what is redirected there from outside.
func parseIPv4(name, text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || !addr.Is4() || addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("--%s=%s is not usable: give an IPv4 address that is not loopback", name, text)
	}
	return addr, nil
}
