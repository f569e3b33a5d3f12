//go:build e2e

package e2e

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// nodeFaults are those of the node, the agent or the cluster. The first one lasts while podFaults
// come and go: its Event takes longest.
var nodeFaults = []fault{
	{
		what: "a fence cannot be written", reason: "FenceMissing", fix: "see what keeps the agent from writing its rules",
		faces: faces{
			metric:  "`nmi_rules_in_place{component=\"guard\"}` is 0",
			event:   "on the node, after 20 seconds: `FenceMissing`",
			log:     "`putting rules in place failed; retrying`, `reason=FenceMissing`",
			status:  "`\"problem\": \"FenceMissing\"`",
			explain: "`‼ requests`, `FenceMissing: the guard`",
			doctor:  "`guard` × `chain nmi-guard of the table mangle has other rules`",
		},
		breaks: func(b *breakage) {
			b.refuse("nmi-guard")
			b.command("iptables-nft", "-t", "mangle", "-F", "nmi-guard")
			b.mend = func() {
				b.refuse("")
				b.command("iptables-nft", "-t", "mangle", "-F", "nmi-guard") // a change, on which the agent tries at once
			}
		},
	},
	{
		what: "another program has the port of the metrics", fix: "stop it first, or choose another --prometheus-port",
		faces: faces{
			metric:  "none: it is the metrics that cannot be had; Prometheus's `up` is 0",
			event:   "none: pods are served",
			log:     "`cannot serve; trying again`, `port 9090 is taken`",
			status:  "`--prometheus-port cannot be served; trying again: port 9090 is taken`",
			explain: "none: pods are served",
			doctor:  "`notes` ‼ `port 9090 is taken`",
		},
		breaks: func(b *breakage) {
			b.stops(b.serving)
			other := b.listens("0.0.0.0", metricsPort)
			go func() { _ = http.Serve(other, http.NotFoundHandler()) }()
			b.starts(world.Kubeconfig)
			b.says(b.serving, "in sync with the API server")
			assert.NotContains(b.t, b.serving.Log(), "decision changed", "what there is at the start is no change")
			b.mend = func() {
				require.NoError(b.t, other.Close())
				require.Eventually(b.t, func() bool { return len(b.metrics()) > 0 }, patience, 20*time.Millisecond)
			}
		},
	},
	lost("the redirect is flushed", "redirect", "iptables-nft -t nat -F aad-metadata"),
	lost("a fence is flushed", "guard", "iptables-nft -t mangle -F nmi-guard"),
	lost("a routing rule of the other fence is deleted", "routing", "ip rule del pref 11"),
	{
		what: "another program removes rules again and again", fix: "find the program and have it leave these rules alone",
		faces: faces{
			metric:  "`nmi_rules_repairs_total` grows",
			event:   "none: the agent puts them back within a second",
			log:     "`another program keeps changing the rules`",
			status:  "`another program keeps changing the rules: repaired`",
			explain: "none: the rules are there again and again, and pods are served",
			doctor:  "`notes` ‼ `another program keeps changing the rules`, `find the program`",
		},
		breaks: func(b *breakage) {
			for range 7 { // more than the agent thinks ordinary
				b.command("iptables-nft", "-t", "nat", "-F", "aad-metadata")
				require.Eventually(b.t, func() bool { return strings.Contains(b.nat(), "-A aad-metadata") }, patience, 20*time.Millisecond)
			}
		},
	},
	{
		what: "the API server does not answer", fix: "see whether it is up, and whether the node reaches its address",
		faces: faces{
			metric:  "`nmi_watch_staleness_seconds{resource=\"pods\"}` grows",
			event:   "none: the API server is what takes them",
			log:     "`cannot watch the API server; retrying`, `cannot reach the API server`",
			status:  "`decisions may be out of date`, `cannot reach the API server`",
			explain: "`‼ data`, `it may be out of date`",
			doctor:  "`api-server` × `connection refused`",
		},
		breaks: func(b *breakage) {
			require.NoError(b.t, world.StopAPIServer())
			b.mend = func() { require.NoError(b.t, world.StartAPIServer(b.t.Context())) }
		},
	},
	{
		what: "another program has the port that pods are redirected to", fix: "stop it first, or choose another --nmi-port",
		faces: faces{
			metric:  "none: no agent runs; Prometheus's `up` is 0",
			event:   "none: no agent runs; the kubelet has one on the agent's pod, whose container it starts again and again",
			log:     "`port 2579 is taken`",
			status:  "none: no agent answers, which it says",
			explain: "none: no agent answers, which it says",
			doctor:  "`ports` ‼ `no agent answers`, `listens on port 2579`",
		},
		breaks: func(b *breakage) {
			b.stops(b.serving)
			other := b.listens("0.0.0.0", 2579)
			b.serving, b.logged = b.test.agentOf(world.Kubeconfig), 0
			<-b.serving.Done()
			b.mend = func() {
				require.NoError(b.t, other.Close())
				b.starts(world.Kubeconfig)
			}
		},
	},
	{
		what: "the definition of AzureIdentityBindings is missing when the agent starts", reason: "NotSynced", fix: "apply the custom resource definitions",
		faces: refusal("NotSynced").passes("the node's pods are not known yet").saying(func(f *faces) {
			f.status = "`\"synced\": false`, `azureidentitybindings.aadpodidentity.k8s.io: the API server does not have this resource`"
			f.explain = "`the agent has not synced with the API server yet: azureidentitybindings.aadpodidentity.k8s.io`"
			f.doctor = "`definitions` × `the API server does not serve azureidentitybindings`"
		}),
		breaks: func(b *breakage) {
			b.stops(b.serving)
			restore, err := world.RemoveDefinition(b.t.Context(), "azureidentitybindings.aadpodidentity.k8s.io")
			require.NoError(b.t, err)
			b.starts(world.Kubeconfig)
			b.asks = b.asksAnew(b.bystander, "")
			b.mend = func() {
				require.NoError(b.t, restore(b.t.Context()))
				require.NoError(b.t, world.Bind(b.t.Context(), "shop", "cart", cart), "it went with its definition")
				require.NoError(b.t, world.Bind(b.t.Context(), "shop", "report", report))
			}
		},
	},
	{
		what: "the agent's service account may not watch AzureIdentityBindings", fix: "apply its ClusterRole",
		faces: faces{
			metric:  "`nmi_watch_staleness_seconds{resource=\"azureidentitybindings.aadpodidentity.k8s.io\"}` grows",
			event:   "none: pods are served, by what was listed at the start",
			log:     "`cannot watch the API server; retrying`, `azureidentitybindings`, `may not list and watch this resource`",
			status:  "`decisions may be out of date`, `azureidentitybindings.aadpodidentity.k8s.io: the agent's service account may not list and watch this resource`",
			explain: "`‼ data`, `azureidentitybindings.aadpodidentity.k8s.io: the agent's service account may not list and watch this resource`",
			doctor:  "`rights` × `it may not: apply its ClusterRole`",
		},
		breaks: func(b *breakage) {
			const account = "nmi-unwatched"
			b.stops(b.serving)
			b.starts(b.test.account(account, slices.DeleteFunc(chartRights(b.t, "defaults.yaml", "ClusterRole", "nmi"), func(r right) bool {
				return r.resource == "azureidentitybindings" && r.verb == "watch"
			})))
			b.mend = func() {
				role := `[{"op":"add","path":"/rules/-","value":{"apiGroups":["aadpodidentity.k8s.io"],"resources":["azureidentitybindings"],"verbs":["watch"]}}]`
				_, err := world.Kube.RbacV1().ClusterRoles().Patch(b.t.Context(), account, types.JSONPatchType, []byte(role), metav1.PatchOptions{})
				require.NoError(b.t, err)
			}
		},
	},
}

// lost is a part of the rules that another program removes, by a command.
func lost(what, part, command string) fault {
	return fault{
		what: what, fix: "find the program and have it leave these rules alone",
		faces: faces{
			metric:  "`nmi_rules_lost_total{component=\"" + part + "\"}` grows",
			event:   "none: the agent puts it back within a second",
			log:     "`rules were removed or changed by another program`, `" + part + "`",
			status:  "`another program removed or changed rules at`, `" + part + "`",
			explain: "none: the rules are there again, and pods are served",
			doctor:  "`notes` ‼ `another program removed or changed rules at`, `" + part + "`",
		},
		breaks: func(b *breakage) {
			name, args, _ := strings.Cut(command, " ")
			b.command(name, strings.Fields(args)...)
		},
	}
}

// starts starts the next agent, after the last one has stopped.
func (b *breakage) starts(kubeconfig string) {
	b.t.Helper()
	b.kubeconfig = kubeconfig
	b.serving = b.test.agentOf(kubeconfig, "--iptables-backend=nft", "--pod-wait=100ms")
	b.says(b.serving, "listening")
	b.logged, b.before = 0, b.metrics()
}
