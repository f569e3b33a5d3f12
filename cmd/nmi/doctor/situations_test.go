package doctor

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/iptables"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// situation is a node with one fault, and what the checks say of it.
type situation struct {
	breaks func(*node) // or healthy
	anchor string
	result string
	says   string // in the error, or in the description of a check that succeeds
}

var healthy func(*node) // nothing: one report is enough for all of these

var situations = map[string]situation{
	"no agent": {
		func(n *node) {
			n.cfg.Ask = func(context.Context, string) (int, string, error) { return 0, "", errors.New("no agent listens") }
		},
		"agent", Error, "no agent listens. The other checks use this command's flags",
	},
	"an agent of another version": {
		func(n *node) {
			n.cfg.Ask = func(context.Context, string) (int, string, error) { return 200, `{"Node":"node1"}`, nil }
		}, "agent", Error, "of another version than this program",
	},
	"an agent":           {healthy, "agent", Success, "node node1, managed mode, --redirect-mode=dnat"},
	"an agent not ready": {func(n *node) { n.status, n.ready = 503, "not ready:\n- the rules are missing\n- and more\n" }, "ready", Error, "- the rules are missing\n- and more"},
	"a ready agent":      {healthy, "ready", Success, "redirect mode dnat: set by flag"},
	"a quiet agent":      {healthy, "notes", Success, ""},
	"an agent with news": {func(n *node) { n.ready += "IMDS gives no tokens\n" }, "notes", Warning, "IMDS gives no tokens"},

	"served pods": {func(n *node) {
		n.statusz = `{"cluster":{"synced":true},"pods":[{"namespace":"shop","name":"p","state":"ok"},{"namespace":"shop","name":"q","state":"none"}]}`
	}, "pods", Success, "no pod of the node is refused: it knows 2"},
	"a refused pod": {func(n *node) {
		n.statusz = `{"cluster":{"synced":true},"pods":[{"namespace":"shop","name":"p","state":"failed","reason":"Why","fix":"what to do"}]}`
	}, "pods", Warning, "shop/p: Why: what to do"},
	"many refused pods": {func(n *node) {
		n.statusz = `{"cluster":{"synced":true},"pods":[` + strings.Repeat(`{"namespace":"shop","name":"p","state":"warning","reason":"Why"},`, 20) + `{}]}`
	}, "pods", Warning, "\nand more: nmi status"},
	"no pods known": {func(n *node) { n.statusz = `{"cluster":{"synced":false},"pods":[]}` }, "pods", Skipped, "does not know the pods yet"},
	"another program on the port of an agent that does not answer": {func(n *node) {
		n.cfg.Ask = func(context.Context, string) (int, string, error) { return 0, "", errors.New("no agent listens") }
		n.listens("127.0.0.1:2579", "")
	}, "ports", Warning, "no agent answers, and a program of user 0 listens on port 2579: if it is not an agent, stop it first, or choose another --nmi-port"},

	"a shared directory": {healthy, "handover", Success, "--handover-dir"},
	"a private directory": {func(n *node) {
		n.t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
		n.settings.HandoverDir = "/nmi-nowhere"
	}, "handover", Warning, "mount a hostPath of the node there"},
	"no directory":       {func(n *node) { n.settings.HandoverDir = "" }, "handover", Warning, "--handover-dir is empty"},
	"its ports":          {(*node).agentServes, "ports", Success, ""},
	"nobody on the port": {healthy, "ports", Error, "nothing listens on port 2579 (--nmi-port)"},
	"another program on a port": {
		func(n *node) { n.listens("0.0.0.0:2579", ""); n.listens("127.0.0.1:8085", "welcome") },
		"ports", Warning, "--http-probe-port: something else than an agent answers 200 at http://127.0.0.1:8085/healthz",
	},
	"a free port":  {func(n *node) { n.cfg.Pre = true }, "ports", Success, "port 2579 is free"},
	"a taken port": {func(n *node) { n.cfg.Pre = true; n.listens("127.0.0.1:2579", "") }, "ports", Error, "a program of user 0 listens on port 2579"},

	"privileges":              {healthy, "privileges", Success, "NET_ADMIN and NET_RAW"},
	"a backend":               {healthy, "backend", Success, "the backend is nft: set by flag"},
	"no iptables":             {func(n *node) { n.t.Setenv("PATH", "/nowhere") }, "backend", Error, "iptables-nft is not installed"},
	"no iptables, other rows": {func(n *node) { n.t.Setenv("PATH", "/nowhere") }, "guard", Skipped, "iptables is not usable"},
	"rules are admitted":      {healthy, "writable", Success, ""},

	"routing":                {healthy, "routing", Success, ""},
	"guard":                  {healthy, "guard", Success, ""},
	"redirect":               {healthy, "redirect", Success, ""},
	"wireserver":             {healthy, "wireserver", Success, ""},
	"input":                  {healthy, "input", Success, ""},
	"antispoof":              {healthy, "antispoof", Success, ""},
	"a routing rule deleted": {func(n *node) { n.command("ip rule del pref 11") }, "routing", Error, "missing policy routing rules: 11:"},
	"the guard not first": {func(n *node) {
		n.command("iptables-nft -t mangle -I FORWARD -j ACCEPT")
		n.later("iptables-nft -t mangle -D FORWARD -j ACCEPT")
	}, "guard", Error, "is not first"},
	"the redirect flushed":     {func(n *node) { n.command("iptables-nft -t nat -F PREROUTING") }, "redirect", Error, "nothing jumps to chain aad-metadata"},
	"the wireserver open":      {func(n *node) { n.command("iptables-nft -F nmi-wireserver") }, "wireserver", Error, "other rules"},
	"the input chain flushed":  {func(n *node) { n.command("iptables-nft -t mangle -F nmi-input") }, "input", Warning, "other rules"},
	"the antispoof chain gone": {func(n *node) { n.command("iptables-nft -t raw -F") }, "antispoof", Warning, "other rules"},
	"the address gone":         {func(n *node) { n.command("ip addr del 169.254.169.252/32 dev lo") }, "redirect", Error, "lo does not have the address"},

	"no earlier rule": {healthy, "earlier-rules", Success, ""},
	"a table that runs before ours": {func(n *node) {
		n.nft("table ip other {\nchain first {\ntype nat hook prerouting priority -110;\nip daddr 169.254.169.254 tcp dport 80 dnat to 169.254.169.254:80\n}\n}\n")
	}, "earlier-rules", Warning, "nftables table ip other (chain first, type nat, priority -110)"},
	"an earlier routing rule": {func(n *node) { n.command("ip rule add pref 5 lookup main"); n.later("ip rule del pref 5") }, "earlier-rules", Warning, "ip rule 5: lookup 254"},
	"no restriction":          {healthy, "imds-restriction", Skipped, "nothing: pods reach"},
	"a restriction": {
		func(n *node) {
			n.command("iptables-nft -I FORWARD -d 169.254.169.254 -p tcp --dport 80 -j DROP")
			n.later("iptables-nft -F FORWARD")
		},
		"imds-restriction", Success, "iptables-nft -t filter -A FORWARD -d 169.254.169.254/32",
	},

	"no pods":               {healthy, "interfaces", Skipped, "no pod's interface is known yet"},
	"interfaces for dnat":   {func(n *node) { n.addPod(testbed.Routed) }, "interfaces", Success, "has no IPv4 address"},
	"none without API":      {func(n *node) { n.cfg.API, n.cfg.APIErr = nil, errors.New("no kubeconfig") }, "interfaces", Skipped, "needs the API server"},
	"mode redirect, wrong":  {func(n *node) { n.settings.Rules.Mode = iptables.Redirect; n.addPod(testbed.Routed) }, "interfaces", Error, "has no IPv4 address"},
	"mode redirect, right":  {func(n *node) { n.settings.Rules.Mode = iptables.Redirect; n.addPod(testbed.Ptp) }, "interfaces", Success, "every interface that leads to a pod has an IPv4 address"},
	"mode auto, wrong rule": {func(n *node) { n.auto(iptables.Redirect); n.addPod(testbed.Routed) }, "interfaces", Error, "the redirect is that of mode redirect"},
	"mode auto, dnat":       {func(n *node) { n.auto(iptables.DNAT); n.addPod(testbed.Routed) }, "interfaces", Success, "--redirect-mode=auto"},
	"mode none":             {func(n *node) { n.settings.Rules.Mode = iptables.None }, "interfaces", Skipped, "another program redirects"},

	"links of their own": {func(n *node) { n.addPod(testbed.Ptp) }, "arp-spoofing", Success, "each has a link of its own"},
	"a bridge":           {func(n *node) { n.addPod(testbed.Bridge) }, "arp-spoofing", Error, "pods on cbr0 can take each other's addresses"},
	"a bridge, allowed":  {func(n *node) { n.settings.AllowUnguarded = true; n.addPod(testbed.Bridge) }, "arp-spoofing", Warning, "handed out all the same"},
	"a bridge with pinned neighbours": {func(n *node) {
		n.addPod(testbed.Bridge)
		n.command("ip neigh replace 10.244.0.7 lladdr 0a:58:0a:f4:00:07 nud permanent dev cbr0")
	}, "arp-spoofing", Warning, "Their addresses are pinned"},

	"no bypass":               {healthy, "dataplane", Success, ""},
	"a bypass":                {func(n *node) { n.cilium(); n.auto(iptables.DNAT) }, "dataplane", Error, "has a tcx ingress program: use --redirect-mode=ebpf, or none with"},
	"a bypass, and mode dnat": {(*node).cilium, "dataplane", Warning, "works only if Cilium routes through iptables"},
	"a bypass, and mode none": {func(n *node) { n.cilium(); n.settings.Rules.Mode = iptables.None }, "dataplane", Success, "they need not"},

	"no programs left": {healthy, "programs", Success, ""},
	"programs left":    {func(n *node) { n.settings.Rules.Programs.Pins = n.t.TempDir() }, "programs", Error, "they are pinned in"},

	"raw packets, no bypass": {func(n *node) { n.settings.Rules.Mode = iptables.EBPF; n.addPod(testbed.Ptp, container) }, "raw-packets", Success, "the node's routing sees"},
	"raw packets": {func(n *node) {
		n.settings.Rules.Mode = iptables.EBPF
		n.cilium()
		n.addPod(testbed.Ptp, container)
		n.statusz = "{}"
	}, "raw-packets", Warning, "has a tcx ingress program): shop/p-10.244.0.7. Have them drop NET_RAW"},
	"raw packets of an excepted pod": {func(n *node) {
		n.settings.Rules.Mode = iptables.EBPF
		n.cilium()
		n.addPod(testbed.Ptp, container)
		n.statusz = `{"pods":[{"namespace":"shop","name":"p-10.244.0.7","exception":"addons"}]}`
	}, "raw-packets", Success, "none has NET_RAW"},

	"IMDS": {healthy, "imds", Success, "it answered in "},
	"IMDS out of reach": {func(n *node) {
		n.command("ip route add blackhole 169.254.169.254")
		n.later("ip route del 169.254.169.254")
	}, "imds", Error, "is there a firewall"},
	"IMDS slow": {func(n *node) {
		n.imds = func(http.ResponseWriter, *http.Request) { <-time.After(slow + 100*time.Millisecond) }
	}, "imds", Warning, "to answer: is another program"},
	"IMDS broken":     {func(n *node) { n.imds = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) } }, "imds", Warning, "it answers 500"},
	"IMDS behind GPA": {func(n *node) { n.imds = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) } }, "imds", Error, "a proxy before it answers 403"},

	"no metadata proxy": {healthy, "metadata-proxy", Success, ""},
	"a metadata proxy":  {func(n *node) { n.listens("127.0.0.1:3080", "") }, "metadata-proxy", Warning, "GuestProxyAgent"},
	"no cgroup v2":      {healthy, "connect4", Skipped, "no cgroup v2"},

	"the API server":        {healthy, "api-server", Success, "v1.37.0"},
	"no API server":         {func(n *node) { n.cfg.API.Host = "http://127.0.0.1:1" }, "api-server", Error, "connection refused"},
	"no API server, others": {func(n *node) { n.cfg.API.Host = "http://127.0.0.1:1" }, "rights", Skipped, "the API server does not answer"},
	"a node without a kubeconfig, before an installation": {func(n *node) { n.cfg.Pre, n.cfg.API, n.cfg.APIErr = true, nil, errors.New("set KUBECONFIG") }, "api-server", Skipped, "set KUBECONFIG"},
	"a clock that is right":                               {healthy, "clock", Success, "within 10s"},
	"a clock that is fast":                                {func(n *node) { n.date = time.Now().Add(-time.Hour) }, "clock", Warning, "off the API server's"},
	"a clock that is slow":                                {func(n *node) { n.date = time.Now().Add(time.Minute) }, "clock", Warning, "off the API server's"},
	"no federation":                                       {healthy, "federation", Success, "none, which only federation needs"},
	"every service account":                               {func(n *node) { n.rights = wide }, "federation", Warning, "every service account of the cluster"},
	"its own node":                                        {func(n *node) { n.rights = asNode; n.settings.Federation.AsNode = true }, "federation", Success, "those of its own node's pods"},
	"its own node, and a namespace": {func(n *node) {
		n.rights = append([]string{"create serviceaccounts/token shop"}, asNode...)
		n.settings.Federation.AsNode = true
		n.addPod(testbed.Ptp)
	}, "federation", Warning, "shop"},
	"its own node, no flag":  {func(n *node) { n.rights = asNode }, "federation", Warning, "set --federation-as-node"},
	"its own node, no right": {func(n *node) { n.rights = asNode[:1]; n.settings.Federation.AsNode = true }, "federation", Warning, "deploy/federation/own-node.yaml"},
	"a namespace":            {func(n *node) { n.rights = []string{"create serviceaccounts/token shop"}; n.addPod(testbed.Ptp) }, "federation", Success, "those of namespaces with pods on this node: shop"},
	"no namespace":           {func(n *node) { n.settings.Federation.ServiceAccounts = true; n.addPod(testbed.Ptp) }, "federation", Warning, "it may request none"},
	"no workload identity":   {func(n *node) { n.addPod(testbed.Ptp) }, "workload-identity", Success, ""},
	"a federated AzureIdentity": {func(n *node) {
		for _, value := range []string{"", "true"} {
			n.ids = append(n.ids, metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart" + value, Annotations: map[string]string{aadpodidentity.FederatedAnnotation: value}}})
		}
	}, "federation", Warning, "no tokens for federated AzureIdentities, such as shop/carttrue"},
	"workload identity alone":                  {func(n *node) { n.addPod(testbed.Ptp, federated) }, "workload-identity", Success, "1 of the node's pods use Azure Workload Identity alone"},
	"workload identity, and a binding's label": {func(n *node) { n.addPod(testbed.Ptp, federated, labelled) }, "workload-identity", Warning, "shop/p-10.244.0.7: most Azure SDKs prefer"},
	"workload identity's proxy":                {func(n *node) { n.addPod(testbed.Ptp, federated, proxied) }, "workload-identity", Success, "1 of the node's pods"},
	"workload identity's proxy, and mode ebpf": {func(n *node) {
		n.settings.Rules.Mode = iptables.EBPF
		n.addPod(testbed.Ptp, federated, proxied)
	}, "workload-identity", Warning, "shop/p-10.244.0.7: with --redirect-mode=ebpf their requests"},
}

// Rights for federation, as node.rights has them.
var (
	wide   = []string{"create serviceaccounts/token"}
	asNode = []string{"impersonate:associated-node nodes", "impersonate-on:associated-node:create serviceaccounts/token"}
)

func federated(p *corev1.Pod) {
	p.Spec.Containers = []corev1.Container{{Name: "app", Env: []corev1.EnvVar{{Name: "AZURE_FEDERATED_TOKEN_FILE", Value: "/token"}}}}
}

func proxied(p *corev1.Pod) {
	p.Annotations = map[string]string{"azure.workload.identity/inject-proxy-sidecar": "true"}
}

// container has the capabilities that containerd gives by default.
func container(p *corev1.Pod) { p.Spec.Containers = []corev1.Container{{Name: "app"}} }

func labelled(p *corev1.Pod) { p.Labels = map[string]string{"aadpodidbinding": "cart"} }

// later runs a command when the test ends.
func (n *node) later(line string) { n.t.Cleanup(func() { n.command(line) }) }

// auto is an agent in mode auto that has selected a mode.
func (n *node) auto(mode iptables.Mode) {
	n.settings.Rules.Mode = mode
	n.redirect(n.settings.Rules)
	n.settings.Rules.Mode = iptables.ModeAuto
}

// cilium is a node whose pods have eBPF programs, as with Cilium.
func (n *node) cilium() {
	host, err := testbed.AddCiliumHost()
	require.NoError(n.t, err)
	n.t.Cleanup(func() { assert.NoError(n.t, netlink.LinkDel(host)) })
	p, err := n.network.AddPod("10.244.0.9", testbed.Routed)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { assert.NoError(n.t, p.Close()) })
	link, err := netlink.LinkByName(p.Link)
	require.NoError(n.t, err)
	require.NoError(n.t, testbed.AttachTCX(link))
}
