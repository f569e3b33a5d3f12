package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
	"github.com/podidentity/nmi/tokencache"
)

// config is what the flags come to, validated.
type config struct {
	node           string
	metadata       netip.AddrPort
	port           uint16
	probePort      uint16
	mode           iptables.Mode
	address        netip.Addr
	backend        iptables.Backend
	interval       time.Duration
	blockInstance  bool
	headerOptional bool
	userAgent      string
	authorities    []string // hosts, see upstream.Config

	prometheusPort  uint16
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

// Names of the flags that choose ports.
const (
	flagPort           = "nmi-port"
	flagProbePort      = "http-probe-port"
	flagPrometheusPort = "prometheus-port"
)

// portFlag is a port to listen on, and the flag that chooses it.
type portFlag struct {
	name string
	port uint16
}

func (c config) ports() []portFlag {
	return []portFlag{{flagPort, c.port}, {flagProbePort, c.probePort}, {flagPrometheusPort, c.prometheusPort}}
}

// warn logs what was chosen at the operator's own risk.
func (c config) warn(log *slog.Logger) {
	if c.headerOptional {
		log.Warn(`the header "Metadata: true" is not asked for: pods that fetch URLs for others can be made to fetch tokens`)
	}
}

// options are the flags as they were given.
type options struct {
	version               bool
	node                  string
	operationMode         string
	port                  uint16
	metadataIP            string
	metadataPort          uint16
	probePort             uint16
	intervalSeconds       int
	blockInstanceMetadata bool
	headerRequired        bool
	userAgent             string
	logFormat             string
	redirectMode          string
	redirectAddress       string
	backend               string
	prometheusPort        uint16
	blockWireserver       bool
	allowKubenet          bool
	handoverDir           string
	forceNamespaced       bool
	micNamespace          string
	strictSelection       bool
	podWait               time.Duration
	identityWait          time.Duration
	maxStaleness          time.Duration
	probeSocket           string
	tokensPerSecond       int
	tokensAtOnce          int
	maxConnections        int
	maxConnectionsPerPod  int
	hostTokenUIDs         string
	allow                 []string
	authorities           []string

	klog *flag.FlagSet
}

func newOptions() *options {
	o := &options{klog: flag.NewFlagSet("klog", flag.ContinueOnError)}
	klog.InitFlags(o.klog)
	return o
}

const (
	maxIntervalSeconds = 24 * 60 * 60
	maxWait            = time.Minute
	maxTokenRate       = 1000
	maxConnections     = 1_000_000
	// The API server sends something about once a minute.
	minStaleness = 2 * time.Minute
)

// debugVerbosity is the --v from which debug messages are logged; klog's users
// know 4 as "debug".
const debugVerbosity = 4

func (o *options) addTo(fs *pflag.FlagSet) {
	fs.BoolVar(&o.version, "version", false, "print the version and exit")
	fs.StringVar(&o.node, "node", "", "name of the node that the agent runs on (required; in a DaemonSet $(NODE_NAME) from spec.nodeName)")
	o.addResolving(fs)
	fs.Uint16Var(&o.port, flagPort, 2579, "port that redirected connections come to")
	fs.StringVar(&o.metadataIP, "metadata-ip", "169.254.169.254", "address of the instance metadata service")
	fs.Uint16Var(&o.metadataPort, "metadata-port", 80, "port of the instance metadata service")
	fs.Uint16Var(&o.probePort, flagProbePort, 8080, "port of /healthz and /readyz")
	fs.Uint16Var(&o.prometheusPort, flagPrometheusPort, 9090, "port of /metrics")
	fs.IntVar(&o.intervalSeconds, "ipt-update-interval-sec", 60, "seconds between checks of the iptables rules")
	fs.BoolVar(&o.blockInstanceMetadata, "block-instance-metadata", false, "answer 403 to /metadata/instance, except to excepted pods")
	fs.BoolVar(&o.headerRequired, "metadata-header-required", true, `refuse requests without the header "Metadata: true"; turning it off exposes pods that fetch URLs for others`)
	fs.BoolVar(&o.allowKubenet, "allow-network-plugin-kubenet", false, "hand out tokens although pods share a bridge on which they can take each other's addresses (CVE-2021-1677)")
	fs.StringVar(&o.userAgent, "custom-user-agent", "", "text to append to the user agent of requests to IMDS, Entra and the API server")
	o.addLogging(fs)

	// Ours.
	fs.StringVar(&o.redirectMode, "redirect-mode", string(iptables.AutoMode),
		`"redirect": to the pod-facing interface's own address, where it has one; "dnat": to --redirect-address, on any interface; "auto": whichever works for this node's pods; "none": the redirect is somebody else's, such as Cilium's`)
	o.addRedirectAddress(fs)
	fs.StringVar(&o.backend, "iptables-backend", string(iptables.Auto), `"nft" or "legacy"; "auto" finds out which one the node uses`)

	fs.StringSliceVar(&o.authorities, upstream.AuthorityFlag, nil, "URL of an Entra authority, beside Microsoft's own, that client secrets and certificates of AzureIdentities may be used with (adEndpoint); repeat it or separate several by commas")
	fs.BoolVar(&o.blockWireserver, "block-wireserver", false, "reject what pods send to Azure's wireserver, 168.63.129.16 ports 80 and 32526")
	fs.DurationVar(&o.podWait, "pod-wait", podresolver.DefaultPodWait, "how long a request from an unknown address waits for its pod")
	fs.DurationVar(&o.identityWait, "identity-wait", podresolver.DefaultIdentityWait, "how long a request waits for MIC to assign the identity, in standard mode")
	fs.DurationVar(&o.maxStaleness, "max-staleness", 0, "how long tokens are served while the API server cannot be watched; 0 is for ever")
	fs.StringVar(&o.handoverDir, "handover-dir", "/run/nmi", `directory on the node over which a new agent takes over from the one that runs; "" for none`)
	o.addProbeSocket(fs)
	fs.IntVar(&o.tokensPerSecond, "imds-token-rate", tokencache.DefaultPerSecond, "most requests a second for tokens to IMDS, whose limit is 20 per virtual machine")
	fs.IntVar(&o.tokensAtOnce, "imds-token-concurrency", tokencache.DefaultAtOnce, "most requests at once for tokens to IMDS, whose limit is 5 per virtual machine")
	fs.IntVar(&o.maxConnections, "max-connections", proxy.DefaultMaxConnections, "most connections that pods have open; one more takes the place of an idle one")
	fs.IntVar(&o.maxConnectionsPerPod, "max-connections-per-pod", proxy.DefaultMaxConnectionsPerPod, "most connections that one pod has open; likewise")
	fs.StringSliceVar(&o.allow, "allow-path", nil, "paths to pass on that are not served otherwise, separated by commas: "+strings.Join(proxy.Sensitive, ", "))
	fs.StringVar(&o.hostTokenUIDs, "host-token-uids", "0", "users of the node, by number and separated by commas, whose processes may ask for a pod's token at /host/token over loopback, as the Secrets Store CSI driver's provider does; \"\" turns it off")

	// The old NMI's, for which there is nothing left to do.
	const accepted = "accepted for compatibility: "
	fs.String("nmi-listen-address", "127.0.0.1", accepted+"the agent listens on all addresses, and takes redirected connections only")
	fs.Int("retry-attempts-for-created", 16, accepted+"waiting ends with the event waited for, not after attempts")
	fs.Int("retry-attempts-for-assigned", 4, accepted+"see --retry-attempts-for-created")
	fs.Int("find-identity-retry-interval", 5, accepted+"see --retry-attempts-for-created")
	fs.Bool("enableScaleFeatures", true, accepted+"always on")
	fs.Bool("enableProfile", false, accepted+"no profiling endpoint is served yet")
	fs.String("kubelet-config", "/etc/default/kubelet", accepted+"not read")
	fs.Bool("set-retry-after-header", false, accepted+"Retry-After is always set where asking again helps")
	fs.Bool("enable-conntrack-deletion", false, accepted+"always on: connections from before the rules are cut")
}

// addResolving adds the flags that bear on what is decided for a pod.
func (o *options) addResolving(fs *pflag.FlagSet) {
	fs.StringVar(&o.operationMode, "operation-mode", "standard", `"managed": AzureIdentityBindings decide; "standard": the AzureAssignedIdentities that MIC makes`)
	fs.BoolVar(&o.forceNamespaced, "forceNamespaced", os.Getenv("FORCENAMESPACED") == "true", "in standard mode, give identities to pods of their own namespace only; managed mode always does (also the environment's FORCENAMESPACED=true)")
	fs.StringVar(&o.micNamespace, "MICNamespace", "default", "namespace of the Deployment mic, whose pods get what IMDS gives the node")
	fs.BoolVar(&o.strictSelection, "strict-identity-selection", false, "refuse requests that name no identity where a pod has several, instead of choosing one")
}

func (o *options) addLogging(fs *pflag.FlagSet) {
	fs.StringVar(&o.logFormat, "log-format", "text", `"text" or "json"`)
	// klog's own, for which only the verbosity has a meaning here.
	o.klog.VisitAll(func(f *flag.Flag) {
		p := pflag.PFlagFromGoFlag(f)
		if f.Name == "v" {
			p.Usage = fmt.Sprintf("verbosity; from %d on debug messages are logged", debugVerbosity)
		} else {
			p.Hidden = true
		}
		fs.AddFlag(p)
	})
}

func (o *options) addRedirectAddress(fs *pflag.FlagSet) {
	fs.StringVar(&o.redirectAddress, "redirect-address", iptables.DefaultAddress.String(), "address of the agent's own on lo, for --redirect-mode=dnat")
}

// config validates the options. Its error names the flag and says what it takes.
func (o *options) config() (config, error) {
	cfg := config{
		node:           o.node,
		port:           o.port,
		probePort:      o.probePort,
		interval:       time.Duration(o.intervalSeconds) * time.Second,
		blockInstance:  o.blockInstanceMetadata,
		headerOptional: !o.headerRequired,
		prometheusPort: o.prometheusPort, blockWireserver: o.blockWireserver,
		allowUnguarded: o.allowKubenet, handoverDir: o.handoverDir, probeSocket: o.probeSocket,
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
	taken := map[uint16]string{}
	for _, p := range cfg.ports() {
		if p.port == 0 {
			return config{}, fmt.Errorf("--%s=0 is not a port: use 1 to 65535", p.name)
		}
		if other := taken[p.port]; other != "" {
			return config{}, fmt.Errorf("--%s and --%s are both %d: choose two", other, p.name, p.port)
		}
		taken[p.port] = p.name
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

// resolving is what the flags of addResolving come to.
func (o *options) resolving(node string) (podresolver.Config, error) {
	mode := podresolver.Mode(strings.ToLower(o.operationMode))
	if mode != podresolver.Managed && mode != podresolver.Standard {
		return podresolver.Config{}, fmt.Errorf(`--operation-mode=%s is unknown: use "managed" or "standard"`, o.operationMode)
	}
	return podresolver.Config{
		Node: node, Mode: mode, Namespaced: o.forceNamespaced, MICNamespace: o.micNamespace, StrictSelection: o.strictSelection,
	}, nil
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

// logger writes to w in the chosen format and verbosity, and makes client-go's
// messages go the same way.
func (o *options) logger(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if v, ok := o.klog.Lookup("v").Value.(flag.Getter); ok {
		if n, ok := v.Get().(klog.Level); ok && n >= debugVerbosity {
			level = slog.LevelDebug
		}
	}
	handlerOptions := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(w, handlerOptions)
	if o.logFormat == "json" {
		h = slog.NewJSONHandler(w, handlerOptions)
	}
	log := slog.New(h)
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
	return log
}
