//go:build e2e

package e2e

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// What somebody who may write pods, AzureIdentities, bindings or exceptions must not
// get by it.

// micLookalike makes a pod of namespace default that has all that a pod of the Deployment
// mic has. Nobody checks who owns a pod: its author writes that.
func (s *scenario) micLookalike(addr string) (*pod, string) {
	s.t.Helper()
	const name, hash = "mic-5d9f8c7b6-abcde", "5d9f8c7b6"
	p := s.network(addr, testbed.Ptp)
	controller := true
	pods := world.Kube.CoreV1().Pods("default")
	_, err := pods.Create(s.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Labels: map[string]string{"pod-template-hash": hash},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "mic-" + hash, UID: "11111111-2222-3333-4444-555555555555", Controller: &controller,
			}},
		},
		Spec: corev1.PodSpec{NodeName: testbed.NodeName, Containers: []corev1.Container{{Name: "app", Image: "example/app"}}},
	}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = world.DeletePod(context.Background(), "default", name) })
	require.NoError(s.t, world.SetPodAddress(s.t.Context(), "default", name, addr))
	return p, "default/" + name
}

// explain is what nmi explain prints.
func (s *scenario) explain(args ...string) string {
	s.t.Helper()
	code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig}, append([]string{"explain"}, args...)...)
	require.NoError(s.t, err)
	assert.Zero(s.t, code, output)
	return output
}

func TestAPodThatLooksLikeMICGetsNothing(t *testing.T) {
	for name, flags := range map[string][]string{
		"managed mode":                          {"--operation-mode=managed"},
		"managed mode, MIC's namespace given":   {"--operation-mode=managed", "--MICNamespace=default"},
		"standard mode":                         {"--operation-mode=standard"},
		"standard mode, MIC in another":         {"--operation-mode=standard", "--MICNamespace=kube-system"},
		"standard mode, MIC's exception is off": {"--operation-mode=standard", "--MICNamespace="},
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			agent := s.agent(flags...)
			p, podName := s.micLookalike("10.244.0.61")
			got := p.asks(vault)
			assert.Equal(t, 400, got.status, got.body)
			assert.Empty(t, got.subject)
			assert.Equal(t, 404, p.get("http://"+testbed.MetadataAddress+"/metadata/attested/document?api-version=2021-02-01", patience).status)
			assert.Zero(t, world.IMDS.Requests(), "nothing is passed through")

			explained := s.explain(append(flags, podName)...)
			assert.Contains(t, explained, "has no identity\n")
			assert.NotContains(t, explained, "is excepted")
			ignored := strings.Count(agent.Log(), "--MICNamespace is ignored in managed mode")
			assert.Equal(t, strings.Contains(name, "managed mode, MIC"), ignored == 1, agent.Log())
		})
	}
}

func TestMICIsExceptedWhereItsNamespaceIsGiven(t *testing.T) {
	s := begin(t)
	flags := []string{"--operation-mode=standard", "--MICNamespace=default"}
	s.agent(flags...)
	p, podName := s.micLookalike("10.244.0.61")
	assert.Equal(t, imdstest.Node, p.asks(vault).subject)
	assert.Contains(t, s.explain(append(flags, podName)...), `it is a pod of the Deployment mic in namespace "default"`)
}

func TestADeniedIdentityIsGivenByNoBinding(t *testing.T) {
	byClient, byResource := imdstest.Identity{ClientID: third.ClientID}, imdstest.Identity{ResourceID: third.ResourceID}
	byClientID := "has client ID " + third.ClientID + ", denied by --deny-identity"
	byResourceID := "has resource ID " + strings.ToLower(third.ResourceID) + ", denied by --deny-identity"
	for name, tc := range map[string]struct {
		deny     string
		identity imdstest.Identity
		asked    int    // requests that IMDS gets
		log      string // why, in the agent's log
		explain  string // in nmi explain
	}{
		"by client ID":                        {strings.ToUpper(third.ClientID), third, 0, byClientID, byClientID},
		"by resource ID":                      {strings.ToUpper(third.ResourceID), third, 0, byResourceID, byResourceID},
		"by client ID, named by client ID":    {third.ClientID, byClient, 0, byClientID, byClientID},
		"by client ID, named by resource ID":  {third.ClientID, byResource, 1, "the token is for client ID " + third.ClientID + ", denied by --deny-identity", `AzureIdentity "denied" has no client ID; if its tokens are for a client ID in --deny-identity, requests for them are refused`},
		"by resource ID, named by that":       {third.ResourceID, byResource, 0, byResourceID, byResourceID},
		"by both, in a spelling of their own": {third.ClientID + "," + third.ResourceID, imdstest.Identity{ResourceID: third.ResourceID + "/"}, 0, "is not the resource ID of a user-assigned identity", "is not the resource ID of a user-assigned identity"},
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			s.identity("shop", "denied", tc.identity)
			s.binding("shop", "denied", "denied", "denied")
			p := s.pod("denied-0", "10.244.0.62", testbed.Ptp, "denied")
			agent := s.agent("--deny-identity=" + tc.deny)
			for range 2 {
				got := p.asks(vault)
				assert.Equal(t, 400, got.status, got.body)
				assert.Empty(t, got.subject)
			}
			assert.Equal(t, tc.asked, world.IMDS.Requests())
			assert.Contains(t, agent.Log(), tc.log)
			assert.Contains(t, s.explain("--operation-mode=managed", "--deny-identity="+tc.deny, "shop/denied-0"), tc.explain)

			other := s.pod("cart-0", "10.244.0.63", testbed.Ptp, "cart")
			assert.Equal(t, cart.ClientID, other.asks(vault).subject)
		})
	}
}

func TestAnExceptionOutsideTheListIsNone(t *testing.T) {
	const ignored = `AzurePodIdentityException "mine" is ignored: namespace "shop" is not in --exception-namespaces`
	for name, tc := range map[string]struct {
		flags           []string
		mine, addons    string // whose token their pods get, "" for none
		explained, says string
	}{
		"not given": {nil, imdstest.Node, imdstest.Node, `is excepted by "mine"`, ""},
		"one":       {[]string{"--exception-namespaces=kube-system"}, "", imdstest.Node, ignored, ignored},
		"another":   {[]string{"--exception-namespaces=shop"}, imdstest.Node, "", `is excepted by "mine"`, ""},
		"none":      {[]string{"--exception-namespaces="}, "", "", ignored, ignored},
	} {
		t.Run(name, func(t *testing.T) {
			s := begin(t)
			labels := map[string]string{"app": "mine"}
			s.put("AzurePodIdentityException", "shop", "mine", map[string]any{"spec": map[string]any{"podLabels": map[string]any{"app": "mine"}}})
			mine, addon := s.network("10.244.0.64", testbed.Ptp), s.network("10.244.0.65", testbed.Ptp)
			s.object("shop", "mine-0", "10.244.0.64", labels)
			s.object("kube-system", "addon-0", "10.244.0.65", map[string]string{"kubernetes.azure.com/managedby": "aks"}) // of deploy/manifests
			agent := s.agent(tc.flags...)
			passedOn := 0
			for p, want := range map[*pod]string{mine: tc.mine, addon: tc.addons} {
				got := p.asks(vault)
				assert.Equal(t, want, got.subject, got.body)
				if want != "" {
					passedOn++
				} else {
					assert.Equal(t, 400, got.status)
				}
			}
			assert.Equal(t, passedOn, world.IMDS.Requests())
			assert.Contains(t, s.explain(append(tc.flags, "--operation-mode=managed", "shop/mine-0")...), tc.explained)
			if tc.says != "" {
				assert.Contains(t, strings.ReplaceAll(agent.Log(), `\"`, `"`), tc.says)
			}
		})
	}
}
