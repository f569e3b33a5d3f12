package main

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

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
	instanceNamespaces    []string
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
	denyIdentities        []string
	exceptionNamespaces   []string // nil if the flag was not given
	podWait               time.Duration
	identityWait          time.Duration
	maxStaleness          time.Duration
	probeSocket           string
	probeAddress          string
	metricsAddress        string
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
	flagOperationMode      = "operation-mode"
	flagInstanceNamespaces = "instance-metadata-namespaces"
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
	fs.StringVar(&o.probeAddress, flagProbeAddress, "0.0.0.0", "address that --http-probe-port is on; 127.0.0.1 keeps it to the node, :: is all IPv4 and IPv6 addresses")
	fs.StringVar(&o.metricsAddress, flagMetricsAddress, "0.0.0.0", "address that --prometheus-port is on, likewise")
	fs.Uint16Var(&o.prometheusPort, flagPrometheusPort, 9090, "port of /metrics")
	fs.IntVar(&o.intervalSeconds, "ipt-update-interval-sec", 60, "seconds between checks of the iptables rules")
	fs.BoolVar(&o.blockInstanceMetadata, "block-instance-metadata", false, "answer 403 to /metadata/instance, except to excepted pods")
	fs.StringSliceVar(&o.instanceNamespaces, flagInstanceNamespaces, nil, "with --block-instance-metadata, namespaces whose pods may have /metadata/instance all the same; repeat it or separate several by commas")
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
	fs.DurationVar(&o.maxStaleness, "max-staleness", 0, "how long tokens are served while the API server sends no news of a resource, not even when asked; 0 is for ever")
	fs.StringVar(&o.handoverDir, "handover-dir", "/run/nmi", `directory on the node over which a new agent takes over from the one that runs; "" for none`)
	o.addProbeSocket(fs)
	fs.IntVar(&o.tokensPerSecond, "imds-token-rate", upstream.DefaultPerSecond, "most requests a second for tokens to IMDS, which allows 20 per virtual machine; the rest is for the node's own programs")
	fs.IntVar(&o.tokensAtOnce, "imds-token-concurrency", upstream.DefaultAtOnce, "most requests at once for tokens to IMDS, which allows 5 per virtual machine; the rest is for the node's own programs")
	fs.IntVar(&o.maxConnections, "max-connections", proxy.DefaultMaxConnections, "most connections that pods have open; one more takes the place of one of the pod that has the most")
	fs.IntVar(&o.maxConnectionsPerPod, "max-connections-per-pod", proxy.DefaultMaxConnectionsPerPod, "most connections that one pod has open; one more takes the place of one of its own that is idle")
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
	fs.StringVar(&o.operationMode, flagOperationMode, "standard", `"managed": AzureIdentityBindings decide; "standard": the AzureAssignedIdentities that MIC makes`)
	fs.BoolVar(&o.forceNamespaced, "forceNamespaced", os.Getenv("FORCENAMESPACED") == "true", "in standard mode, give identities to pods of their own namespace only; managed mode always does (also the environment's FORCENAMESPACED=true)")
	fs.StringVar(&o.micNamespace, "MICNamespace", "", "in standard mode, namespace of the Deployment mic, whose pods then get what IMDS gives the node, as does whatever looks like one of them there; not given, or in managed mode, no pod does")
	fs.BoolVar(&o.strictSelection, "strict-identity-selection", false, "refuse requests that name no identity where a pod has several, instead of choosing one")
	fs.StringSliceVar(&o.denyIdentities, podresolver.DenyIdentityFlag, nil, "client ID or resource ID of an identity that no AzureIdentity gives to a pod, such as the kubelet's; repeat it or separate several by commas. A client ID is enough. A resource ID alone does not withhold the identity from an AzureIdentity that names the client ID alone: give both to be sure. Excepted pods ask IMDS themselves, for any identity")
	fs.StringSliceVar(&o.exceptionNamespaces, podresolver.ExceptionNamespacesFlag, nil, "namespaces whose AzurePodIdentityExceptions count; repeat it or separate several by commas. Not given, those of all namespaces do; \"\" is none")
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
