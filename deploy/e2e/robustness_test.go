//go:build e2e

package e2e

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
)

func TestWhatTheAgentCannotUseIsOneClearLine(t *testing.T) {
	taken, err := net.Listen("tcp4", "0.0.0.0:2579")
	require.NoError(t, err)
	defer taken.Close()
	kubeconfig := "KUBECONFIG=" + world.Kubeconfig
	good := []string{"--node=node1", "--operation-mode=managed", "--http-probe-port=8085", "--handover-dir=" + t.TempDir()}
	for name, tc := range map[string]struct {
		env  []string
		args []string
		says string
	}{
		"no node":              {[]string{kubeconfig}, []string{"--operation-mode=managed"}, "--node is required"},
		"no operation mode":    {[]string{kubeconfig}, []string{"--node=node1", "--operation-mode=x"}, `invalid argument "x" for "--operation-mode" flag: want managed or standard`},
		"an unknown mode":      {[]string{kubeconfig}, append(good, "--redirect-mode=magic"), `"magic" is not a redirect mode: use "auto", "redirect", "dnat", "ebpf" or "none"`},
		"a port that is none":  {[]string{kubeconfig}, append(good, "--nmi-port=x"), `invalid argument "x" for "--nmi-port"`},
		"an unknown flag":      {[]string{kubeconfig}, append(good, "--nmi-prot=1"), "unknown flag: --nmi-prot"},
		"an unknown command":   {[]string{kubeconfig}, []string{"clean"}, `unexpected argument "clean": the commands are cleanup, doctor, explain, migrate, probe, status and version`},
		"a taken port":         {[]string{kubeconfig}, good, "port 2579 is taken"},
		"no kubeconfig":        {[]string{"KUBECONFIG=/nowhere"}, good, "reading KUBECONFIG=/nowhere"},
		"an empty kubeconfig":  {[]string{"KUBECONFIG=/dev/null"}, good, "KUBECONFIG=/dev/null has no current context"},
		"a boolean apart":      {[]string{kubeconfig}, append(good, "--block-instance-metadata", "true"), "the values of boolean flags are written --flag=true"},
		"no cluster":           {[]string{"KUBECONFIG="}, good, "set KUBECONFIG, or run in a pod"},
		"a probe of nobody":    {nil, []string{"probe", "ready"}, `no agent listens on "/run/nmi-probe/probe.sock"`},
		"a probe of nothing":   {nil, []string{"probe", "live", "--probe-socket=/nowhere"}, `no agent listens on "/nowhere": `},
		"an unknown probe":     {nil, []string{"probe", "up"}, `unexpected argument "up": want one of live and ready`},
		"cleanup of a nothing": {nil, []string{"cleanup", "--redirect-address=x"}, `invalid argument "x" for "--redirect-address" flag: want an IPv4 address`},
	} {
		t.Run(name, func(t *testing.T) {
			code, output, err := testbed.RunAgent(tc.env, tc.args...)
			require.NoError(t, err)
			assert.Equal(t, 1, code, output)
			last := lastLine(output)
			assert.True(t, strings.HasPrefix(last, "nmi: "), output)
			assert.Contains(t, last, tc.says)
			assert.NotContains(t, output, "panic")
			assert.NotContains(t, output, "Usage:")
		})
	}
	t.Run("no root", func(t *testing.T) {
		code, output, err := testbed.RunAgentAsNobody(good...)
		require.NoError(t, err)
		assert.Equal(t, 1, code)
		assert.Contains(t, lastLine(output), "run as root with the capabilities NET_ADMIN and NET_RAW")
		assert.Regexp(t, "msg=starting .* operation_mode=managed redirect_mode=auto\n", output)
	})
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestItWaitsForTheAPIServerAndSaysSo(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	require.NoError(t, world.StopAPIServer())
	a := s.agentNotReady()
	require.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == 503 && strings.Contains(text, "pods") && strings.Contains(text, "connection refused")
	}, patience, 10*time.Millisecond)
	// The rules are there already: the pod is told to come back, where without an
	// agent it would have been given the node's identity.
	s.says(a, "iptables rules put in place")
	early := p.asks(vault)
	assert.Equal(t, 503, early.status)
	assert.NotEmpty(t, early.retryAfter)
	require.NoError(t, world.StartAPIServer(t.Context()))
	require.NoError(t, a.AwaitReady(t.Context()))
	assert.Equal(t, 200, p.asks(vault).status)
}

func TestItWaitsForMissingDefinitionsAndSaysWhich(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	restore, err := world.RemoveDefinition(t.Context(), "azureidentitybindings.aadpodidentity.k8s.io")
	require.NoError(t, err)
	a := s.agentNotReady()
	assert.Eventually(t, func() bool {
		status, text := a.Ready(t.Context())
		return status == 503 && strings.Contains(text, "azureidentitybindings.aadpodidentity.k8s.io: the API server does not have this resource: apply the custom resource definitions")
	}, patience, 10*time.Millisecond)
	s.says(a, "iptables rules put in place")
	assert.Equal(t, 503, p.asks(vault).status, "not now, and no refusal for good")
	require.NoError(t, restore(t.Context()))
	require.NoError(t, world.Bind(t.Context(), "shop", "cart", cart), "it went with its definition")
	require.NoError(t, world.Bind(t.Context(), "shop", "report", report))
	require.NoError(t, a.AwaitReady(t.Context())) // perhaps by a list from before they were back
	p.hears(vault, cart.ClientID)
}

func TestWithoutTheDefinitionOfExceptionsNobodyIsExcepted(t *testing.T) {
	s := begin(t)
	p := s.pod("cart-0", "10.244.0.11", testbed.Ptp, "cart")
	restore, err := world.RemoveDefinition(t.Context(), "azurepodidentityexceptions.aadpodidentity.k8s.io")
	require.NoError(t, err)
	a := s.agent()
	_, text := a.Ready(t.Context())
	assert.Contains(t, text, "azurepodidentityexceptions.aadpodidentity.k8s.io: the API server does not have this resource: apply the custom resource definitions")
	assert.Equal(t, 200, p.asks(vault).status)
	require.NoError(t, restore(t.Context()))
	require.Eventually(t, func() bool {
		_, text := a.Ready(t.Context())
		return !strings.Contains(text, "azurepodidentityexceptions")
	}, patience, 20*time.Millisecond, "known now")
}

func TestTheServiceAccountMayReadWhatIsNeededAndNoMore(t *testing.T) {
	may := func(verb, group, resource, namespace string) bool {
		review, err := world.Kube.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
			Spec: authorizationv1.SubjectAccessReviewSpec{
				User: "system:serviceaccount:kube-system:nmi", Groups: []string{"system:serviceaccounts"},
				ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Namespace: namespace},
			},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
		return review.Status.Allowed
	}
	for _, resource := range []string{"azureidentities", "azureidentitybindings", "azurepodidentityexceptions", "azureassignedidentities"} {
		assert.True(t, may("list", "aadpodidentity.k8s.io", resource, ""))
		assert.True(t, may("watch", "aadpodidentity.k8s.io", resource, ""))
		assert.False(t, may("update", "aadpodidentity.k8s.io", resource, ""))
	}
	assert.True(t, may("list", "", "pods", ""))
	assert.True(t, may("watch", "", "pods", ""))
	assert.False(t, may("delete", "", "pods", "shop"))
	assert.False(t, may("get", "", "secrets", "shop"))
	assert.False(t, may("list", "", "secrets", ""))
	assert.False(t, may("get", "", "nodes", ""))
}

func TestTheDaemonSetIsWhatTheAPIServerStored(t *testing.T) {
	ds, err := world.Kube.AppsV1().DaemonSets("kube-system").Get(t.Context(), "nmi", metav1.GetOptions{})
	require.NoError(t, err)
	pod := ds.Spec.Template.Spec
	assert.True(t, pod.HostNetwork)
	require.Len(t, pod.Containers, 1)
	capabilities := pod.Containers[0].SecurityContext.Capabilities
	assert.Equal(t, []string{"ALL"}, names(capabilities.Drop))
	assert.Equal(t, []string{"NET_ADMIN", "NET_RAW"}, names(capabilities.Add))
	// The binary takes the flags that the manifest gives it.
	args := append([]string{"--version"}, pod.Containers[0].Args...)
	code, output, err := testbed.RunAgent(nil, args...)
	require.NoError(t, err)
	assert.Zero(t, code, output)
}

func TestTheCleanupManifestIsValidAndItsArgumentsWork(t *testing.T) {
	s := begin(t)
	objects, err := testbed.ReadManifests(os.DirFS("../../deploy"), "cleanup.yaml")
	require.NoError(t, err)
	require.NoError(t, testbed.Apply(t.Context(), world.Custom, objects))
	daemonSets := world.Kube.AppsV1().DaemonSets("kube-system")
	ds, err := daemonSets.Get(t.Context(), "nmi-cleanup", metav1.GetOptions{})
	require.NoError(t, err)
	require.Len(t, ds.Spec.Template.Spec.InitContainers, 1)
	args := ds.Spec.Template.Spec.InitContainers[0].Args
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "/host/etc/systemd/system", t.TempDir()) // as the container would have it
	}
	code, output := s.nmi(args...)
	assert.Zero(t, code, output)
	assert.Contains(t, output, "cleaned up")
	require.NoError(t, daemonSets.Delete(t.Context(), "nmi-cleanup", metav1.DeleteOptions{}))
}

func names[T ~string](in []T) []string {
	out := make([]string, len(in))
	for i, name := range in {
		out[i] = string(name)
	}
	return out
}
