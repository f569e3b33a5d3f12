package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/cmd/nmi/handover"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/iptables/links"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

// config is the configurations of the agent's parts. Flags are written straight to them;
// see flags.go. What is not a flag is set where the parts are built.
type config struct {
	resolver podresolver.Config
	rules    iptables.Config
	links    links.Config
	upstream upstream.Config
	proxy    proxy.Config

	federation federationConfig

	front, probes, metrics endpoint     // front is for redirected connections
	probeSocket            string       // "" for none
	legacyMetrics          bool         // see telemetry.Parts
	profile                bool         // see newProfilePage
	handoverDir            string       // "" for no takeovers
	startupTaint           corev1.Taint // without a key for none
	bootGuardDir           string       // "" for no boot guard

	version        bool   // print it and exit
	headerRequired bool   // see proxy.Config.MetadataHeaderOptional
	userAgent      string // text to append
	logFormat      string
	klog           *flag.FlagSet
}

// Names of flags that are used elsewhere, too.
const (
	flagNode               = "node"
	flagPort               = handover.FrontPort
	flagProbePort          = "http-probe-port"
	flagPrometheusPort     = "prometheus-port"
	flagProbeSocket        = "probe-socket"
	flagEnableProfile      = "enableProfile"
	flagOperationMode      = "operation-mode"
	flagBootGuardDir       = "boot-guard-dir"
	flagInstanceNamespaces = "instance-metadata-namespaces"
)

// endpoint is an address and port to listen on, and the flag that chooses the port.
type endpoint struct {
	flag string
	addr netip.AddrPort
}

func newConfig() *config {
	c := &config{
		// On all addresses: a redirected connection comes to whichever the mode says, and
		// the mode may change.
		front:   endpoint{flag: flagPort, addr: netip.AddrPortFrom(netip.IPv4Unspecified(), 0)},
		probes:  endpoint{flag: flagProbePort},
		metrics: endpoint{flag: flagPrometheusPort},
		klog:    flag.NewFlagSet("klog", flag.ContinueOnError),
	}
	klog.InitFlags(c.klog)
	return c
}

// complete checks what takes more than one flag to see, and sets what follows from flags.
func (c *config) complete() error {
	if c.resolver.Node == "" {
		return errors.New("--node is required: the name of the node that the agent runs on (in a DaemonSet, $(NODE_NAME) from the field spec.nodeName)")
	}
	ports := map[uint16]string{}
	for _, e := range []endpoint{c.front, c.probes, c.metrics} {
		port := e.addr.Port()
		if other := ports[port]; other != "" {
			return fmt.Errorf("--%s and --%s are both %d: choose different ports", other, e.flag, port)
		}
		ports[port] = e.flag
	}
	if len(c.proxy.InstanceMetadataNamespaces) > 0 && !c.proxy.BlockInstanceMetadata {
		return fmt.Errorf("--%s limits nothing without --block-instance-metadata: give both, or neither", flagInstanceNamespaces)
	}
	if c.rules.Address == c.rules.Metadata.Addr() {
		return fmt.Errorf("--redirect-address=%s is the metadata service's own address: choose another", c.rules.Address)
	}
	if c.rules.Programs.HostNetworkAll && c.rules.Mode != iptables.EBPF && c.rules.Mode != iptables.ModeAuto {
		return fmt.Errorf("--host-network-pods=%s needs --redirect-mode=ebpf: rules do not see pods on the host network", hostNetworkBound)
	}
	if _, err := os.Stat(filepath.Dir(c.probeSocket)); err != nil && c.probeSocket == defaultProbeSocket {
		c.probeSocket = "" // not in the image: nothing asks there
	}
	if err := c.checkFederation(); err != nil {
		return err
	}
	c.rules.Port = c.front.addr.Port()
	c.rules.Programs.Pins = ebpf.FindPins()
	c.resolver.ByUID, c.resolver.HostNetworkAll = c.rules.Mode == iptables.EBPF, c.rules.Programs.HostNetworkAll
	c.upstream.IMDS = &url.URL{Scheme: "http", Host: c.rules.Metadata.String()}
	c.upstream.UserAgent = strings.TrimSpace("nmi/" + version + " " + c.userAgent)
	c.proxy.MetadataHeaderOptional = !c.headerRequired
	c.proxy.PodsOnly = c.rules.Mode == iptables.None
	return nil
}

// chooseMode chooses mode ebpf for mode auto where that is called for. It does so at the start
// alone: who a caller is depends on it.
func (c *config) chooseMode(ctx context.Context, log *slog.Logger) {
	if c.rules.Mode != iptables.ModeAuto {
		return
	}
	reason, ok := iptables.ChooseEBPF(ctx, c.rules)
	if !ok {
		return
	}
	log.Info("redirect mode chosen", "mode", iptables.EBPF, "reason", reason)
	c.rules.Mode, c.rules.Reason, c.resolver.ByUID = iptables.EBPF, reason, true
}

// warn logs what was chosen at the operator's own risk.
func (c *config) warn(log *slog.Logger) {
	if c.proxy.MetadataHeaderOptional {
		log.Warn(`requests need no header "Metadata: true": pods that fetch URLs for others can be made to fetch tokens`)
	}
	if c.resolver.MICNamespace != "" && c.resolver.Mode == podresolver.Managed {
		log.Warn("--MICNamespace is ignored in managed mode, which has no MIC: pods that look like MIC's are not excepted", "namespace", c.resolver.MICNamespace)
	}
	if denied := c.resolver.Deny; len(denied.ResourceIDs) > len(denied.ClientIDs) {
		log.Warn("--deny-identity has more resource IDs than client IDs: an AzureIdentity that names an identity by its client ID alone is not recognised by a resource ID; give the client IDs as well",
			"client_ids", len(denied.ClientIDs), "resource_ids", len(denied.ResourceIDs))
	}
}

// debugVerbosity is the --v from which debug messages are logged; klog's users know 4 as
// "debug".
const debugVerbosity = 4

// logger writes to w in the chosen format and verbosity, and makes client-go's messages
// go the same way.
func (c *config) logger(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if v, ok := c.klog.Lookup("v").Value.(flag.Getter); ok {
		if n, ok := v.Get().(klog.Level); ok && n >= debugVerbosity {
			level = slog.LevelDebug
		}
	}
	options := &slog.HandlerOptions{Level: level}
	var handler slog.Handler = slog.NewTextHandler(w, options)
	if c.logFormat == "json" {
		handler = slog.NewJSONHandler(w, options)
	}
	log := slog.New(handler)
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
	return log
}
