package main

import (
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/iptables/ebpf"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/proxy"
	"github.com/podidentity/nmi/proxy/upstream"
)

const (
	maxTokenRate   = 1000
	maxConnections = 1_000_000

	// accepted begins the usage of a flag that does nothing.
	accepted = "accepted for compatibility: "
)

// flagGroup is flags with one purpose. docs/flags.md has a table of each group, which
// make docs writes from the flags' defaults and usages.
type flagGroup struct {
	name string // of the table
	add  func(*pflag.FlagSet)
}

// flagGroups lists all flags of the agent, except klog's hidden ones, in the order of
// docs/flags.md. A new flag is a line in one of the groups, and a field of the
// configuration of the part that it is for.
func (c *config) flagGroups() []flagGroup {
	return []flagGroup{
		{"agent", c.addAgentFlags},
		{"identities", c.addIdentityFlags},
		{"federation", c.addTokenRequestFlags},
		{"requests", c.addRequestFlags},
		{"redirect", c.addRedirectFlags},
		{"limits", c.addLimitFlags},
		{"pages", c.addPageFlags},
		{"node", c.addNodeFlags},
		{"compatibility", addCompatibilityFlags},
	}
}

// addFlags adds the flags of the agent.
func (c *config) addFlags(fs *pflag.FlagSet) {
	for _, group := range c.flagGroups() {
		group.add(fs)
	}
}

func (c *config) addAgentFlags(fs *pflag.FlagSet) {
	fs.StringVar(&c.resolver.Node, flagNode, "", "name of the node that the agent runs on: required; in a DaemonSet $(NODE_NAME) from spec.nodeName")
	fs.StringVar(&c.userAgent, "custom-user-agent", "", "text to append to the user agent of requests to IMDS, Entra and the API server")
	c.addLogFlags(fs)
	fs.BoolVar(&c.version, "version", false, "print the version and exit")
}

// addIdentityFlags adds the flags that decide what a pod gets, and how long it waits.
func (c *config) addIdentityFlags(fs *pflag.FlagSet) {
	c.addResolverFlags(fs)
	parsedVar(fs, &c.resolver.PodWait, "pod-wait", podresolver.DefaultPodWait.String(), parseWait, "how long a request from an unknown address waits for its pod, 1m at most")
	parsedVar(fs, &c.resolver.IdentityWait, "identity-wait", podresolver.DefaultIdentityWait.String(), parseWait, "in standard mode, how long a request waits for MIC to assign an identity that a binding gives to the pod, 1m at most")
	parsedVar(fs, &c.resolver.MaxStaleness, "max-staleness", "0s", parseStaleness, "how long tokens are served while the API server sends nothing about a resource, not even when asked; then 503. At least 3m; 0 is for ever")
	listVar(fs, &c.upstream.Authorities, flagEntraAuthority, "", parseAuthorities, "URL of an Entra authority, beside Microsoft's own, that client secrets, certificates and service account tokens of AzureIdentities may be sent to (adEndpoint); repeat it or separate several by commas")
}

// addRequestFlags adds the flags that decide which requests are served.
func (c *config) addRequestFlags(fs *pflag.FlagSet) {
	fs.BoolVar(&c.headerRequired, "metadata-header-required", true, `refuse requests without the header "Metadata: true"; turning it off exposes pods that fetch URLs for others`)
	fs.BoolVar(&c.proxy.BlockInstanceMetadata, "block-instance-metadata", false, "answer 403 to /metadata/instance, except to excepted pods and those of --instance-metadata-namespaces")
	listVar(fs, &c.proxy.InstanceMetadataNamespaces, flagInstanceNamespaces, "", parseNamespaces, "with --block-instance-metadata, namespaces whose pods may have /metadata/instance all the same; repeat it or separate several by commas")
	listVar(fs, &c.proxy.Allow, "allow-path", "", parseAllowedPaths, "paths to pass through to IMDS that are 404 otherwise, separated by commas: "+strings.Join(proxy.AllowablePaths(), ", "))
	listVar(fs, &c.proxy.HostTokenUIDs, "host-token-uids", "0", parseUIDs, `users of the node, by number and separated by commas, whose processes may ask for a pod's token at /host/token over loopback, as the Secrets Store CSI driver's provider does: root's by default; "" turns it off`)
}

// addRedirectFlags adds the flags of the rules, and of where they lead.
func (c *config) addRedirectFlags(fs *pflag.FlagSet) {
	parsedVar(fs, &c.front.addr, flagPort, "2579", parsePortOf(&c.front.addr), "port that redirected connections come to")
	parsedVar(fs, &c.rules.Metadata, "metadata-ip", "169.254.169.254", parseAddrOf(&c.rules.Metadata, parseIPv4), "address of the instance metadata service")
	parsedVar(fs, &c.rules.Metadata, "metadata-port", "80", parsePortOf(&c.rules.Metadata), "port of the instance metadata service")
	parsedVar(fs, &c.rules.Mode, "redirect-mode", string(iptables.ModeAuto), iptables.ParseMode,
		`"redirect": to the pod-facing interface's own address, where it has one; "dnat": to --redirect-address, on any interface; "auto": redirect if every interface that leads to a pod has an IPv4 address, else dnat; "ebpf": to --redirect-address, by programs on the cgroup of all pods, without iptables; "none": another program redirects, such as Cilium`)
	c.addRedirectAddress(fs)
	parsedVar(fs, &c.rules.Programs.CgroupRoot, "cgroup-root", ebpf.DefaultCgroupRoot, parseRequiredPath, "for --redirect-mode=ebpf, directory that the node's /sys/fs/cgroup, of version 2, is mounted at")
	parsedVar(fs, &c.rules.Programs.HostNetworkAll, "host-network-pods", hostNetworkNode, parseHostNetworkPods,
		`for --redirect-mode=ebpf, what pods on the host network get: "node": what is bound to them, and others what IMDS gives the node; "bound": only what is bound to them`)
	parsedVar(fs, &c.rules.Backend, "iptables-backend", string(iptables.BackendAuto), iptables.ParseBackend, `"nft" or "legacy"; "auto" finds out which one the node uses`)
	parsedVar(fs, &c.rules.Interval, "ipt-update-interval-sec", "60", parseSeconds, "seconds between checks of the rules when nothing seems to happen, 1 to 86400; a change that the kernel announces is checked at once")
	fs.BoolVar(&c.links.AllowUnguarded, "allow-network-plugin-kubenet", false, "hand out tokens although pods share a bridge on which they can take each other's addresses (CVE-2021-1677)")
	fs.BoolVar(&c.rules.BlockWireserver, "block-wireserver", false, "reject what pods send to Azure's wireserver, 168.63.129.16 ports 80 and 32526")
}

func (c *config) addLimitFlags(fs *pflag.FlagSet) {
	parsedVar(fs, &c.upstream.PerSecond, "imds-token-rate", strconv.Itoa(upstream.DefaultPerSecond), upTo(maxTokenRate), "most requests a second for tokens to IMDS, which allows 20 per virtual machine; the rest is for the node's own programs")
	parsedVar(fs, &c.upstream.AtOnce, "imds-token-concurrency", strconv.Itoa(upstream.DefaultAtOnce), upTo(maxTokenRate), "most requests at once for tokens to IMDS, which allows 5 per virtual machine; the rest is for the node's own programs")
	parsedVar(fs, &c.proxy.MaxConnections, "max-connections", strconv.Itoa(proxy.DefaultMaxConnections), upTo(maxConnections), "most connections that pods have open; one more takes the place of one of the pod that has the most")
}

// addPageFlags adds the flags of the pages for probes and metrics.
func (c *config) addPageFlags(fs *pflag.FlagSet) {
	parsedVar(fs, &c.probes.addr, flagProbePort, "8080", parsePortOf(&c.probes.addr), "port of /healthz and /readyz, and on a loopback address of /statusz")
	parsedVar(fs, &c.probes.addr, "http-probe-address", "0.0.0.0", parseAddrOf(&c.probes.addr, parseBindAddress), "address that --http-probe-port is on; 127.0.0.1 keeps it to the node, :: is all IPv4 and IPv6 addresses")
	c.addProbeSocket(fs)
	parsedVar(fs, &c.metrics.addr, flagPrometheusPort, "9090", parsePortOf(&c.metrics.addr), "port of /metrics")
	parsedVar(fs, &c.metrics.addr, "metrics-address", "0.0.0.0", parseAddrOf(&c.metrics.addr, parseBindAddress), "address that --prometheus-port is on, likewise")
	fs.BoolVar(&c.profile, flagEnableProfile, false, "serve /debug/pprof, for go tool pprof, on "+profileAddress+", which only the node's own programs and pods on its network reach")
	fs.BoolVar(&c.legacyMetrics, "legacy-metrics", false, "serve the old NMI's metrics too, aadpodidentity_*, for dashboards and alerts that use them")
}

// addNodeFlags adds the flags of what an agent leaves to the next one, and of its node.
func (c *config) addNodeFlags(fs *pflag.FlagSet) {
	c.addHandoverDir(fs)
	parsedVar(fs, &c.startupTaint, "startup-taint", "", parseStartupTaint, "taint, <key>[=<value>]:<effect>, to remove from the node when the agent is ready, and to set while it cannot write its rules; the effect is NoSchedule or NoExecute. It needs the rights of deploy/admission/startup-taint.yaml. \"\" for none")
	c.addBootGuardDir(fs)
}

// addCompatibilityFlags adds the flags of the old NMI that have nothing left to do. Their
// usages say why.
func addCompatibilityFlags(fs *pflag.FlagSet) {
	fs.String("nmi-listen-address", "127.0.0.1", accepted+"the agent listens on all addresses, and takes redirected connections only")
	fs.Int("retry-attempts-for-created", 16, accepted+"waiting ends with the event waited for, not after attempts")
	fs.Int("retry-attempts-for-assigned", 4, accepted+"see --retry-attempts-for-created")
	fs.Int("find-identity-retry-interval", 5, accepted+"see --retry-attempts-for-created")
	fs.Bool("enableScaleFeatures", true, accepted+"always on")
	fs.String("kubelet-config", "/etc/default/kubelet", accepted+"not read, the agent looks at the bridge itself")
	fs.Bool("set-retry-after-header", false, accepted+"Retry-After is always set where asking again helps")
	fs.Bool("enable-conntrack-deletion", false, accepted+"always on: connections from before the rules are cut")
}

// addResolverFlags adds the flags that bear on what is decided for a pod, which nmi
// explain has, too.
func (c *config) addResolverFlags(fs *pflag.FlagSet) {
	r := &c.resolver
	parsedVar(fs, &r.Mode, flagOperationMode, string(podresolver.Standard), parseOperationMode, `"managed": AzureIdentityBindings decide; "standard": the AzureAssignedIdentities that MIC makes`)
	fs.BoolVar(&r.Namespaced, "forceNamespaced", os.Getenv("FORCENAMESPACED") == "true", "in standard mode, give identities to pods of their own namespace only; managed mode always does (also the environment's FORCENAMESPACED=true)")
	fs.StringVar(&r.MICNamespace, "MICNamespace", "", "in standard mode, namespace of the Deployment mic, whose pods then get what IMDS gives the node, as does whatever looks like one of them there; by default, and in managed mode, no pod does")
	fs.BoolVar(&r.StrictSelection, "strict-identity-selection", false, "refuse requests that name no identity where a pod has several, instead of choosing one")
	listVar(fs, &r.Deny, "deny-identity", "", podresolver.ParseDenyList, "client ID or resource ID of an identity that no AzureIdentity gives to a pod, such as the kubelet's; repeat it or separate several by commas. A client ID is enough. A resource ID alone does not withhold the identity from an AzureIdentity that names the client ID alone: give both to be sure. Excepted pods ask IMDS themselves, for any identity")
	c.addFederationFlags(fs)
	listVar(fs, &r.ExceptionNamespaces, "exception-namespaces", "", parseNamespaces, "namespaces whose AzurePodIdentityExceptions count; repeat it or separate several by commas. By default those of all namespaces do; \"\" is none")
}

func (c *config) addLogFlags(fs *pflag.FlagSet) {
	parsedVar(fs, &c.logFormat, "log-format", "text", oneOf("text", "json"), `"text" or "json"`)
	// klog's own, for which only the verbosity has a meaning here.
	c.klog.VisitAll(func(f *flag.Flag) {
		p := pflag.PFlagFromGoFlag(f)
		if f.Name == "v" {
			p.Value = verbosity{p.Value}
			p.Usage = fmt.Sprintf("verbosity, a whole number; from %d on debug messages are logged", debugVerbosity)
		} else {
			p.Hidden = true
		}
		fs.AddFlag(p)
	})
}

func (c *config) addRedirectAddress(fs *pflag.FlagSet) {
	parsedVar(fs, &c.rules.Address, "redirect-address", iptables.DefaultAddress.String(), parseIPv4, "address that connections are redirected to, for --redirect-mode=dnat and ebpf: one that the node has, or a link-local one, which the agent adds to lo")
}

func (c *config) addBootGuardDir(fs *pflag.FlagSet) {
	parsedVar(fs, &c.bootGuardDir, flagBootGuardDir, "", parseAbsolutePath, `directory that the node's /etc/systemd/system is mounted at, for a unit that writes the routing fence at each boot, before the kubelet starts; "" for none`)
}

func (c *config) addHandoverDir(fs *pflag.FlagSet) {
	parsedVar(fs, &c.handoverDir, "handover-dir", "/run/nmi", parseAbsolutePath, `directory on the node over which a new agent takes over from the one that runs; "" for none`)
}

// defaultProbeSocket is in a directory that the image has, and that deploy/manifests gives to
// each pod for itself.
const defaultProbeSocket = "/run/nmi-probe/probe.sock"

func (c *config) addProbeSocket(fs *pflag.FlagSet) {
	parsedVar(fs, &c.probeSocket, flagProbeSocket, defaultProbeSocket, parseAbsolutePath,
		`Unix socket of /healthz, /readyz and /statusz, for "nmi probe", "nmi status", "nmi explain" and "nmi doctor", in a directory of this pod alone. The default is used only where its directory exists, as in the image; "" for none`)
}
