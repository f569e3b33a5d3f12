//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// The scenarios of aad-pod-identity's own e2e that concern the agent, in managed
// and in standard mode.

// put makes or changes an object until the test ends, and returns what deletes it.
func (s *scenario) put(kind, namespace, name string, fields map[string]any) (remove func()) {
	s.t.Helper()
	object := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": aadpodidentity.GroupVersion.String(), "kind": kind,
		"metadata": map[string]any{"namespace": namespace, "name": name},
	}}
	for field, value := range fields {
		if field == "labels" || field == "annotations" {
			object.Object["metadata"].(map[string]any)[field] = value
			continue
		}
		object.Object[field] = value
	}
	require.NoError(s.t, testbed.Apply(s.t.Context(), world.Custom, []*unstructured.Unstructured{object}))
	resources := map[string]dynamic.NamespaceableResourceInterface{
		"AzureIdentity":             world.Custom.Resource(aadpodidentity.AzureIdentities),
		"AzureIdentityBinding":      world.Custom.Resource(aadpodidentity.AzureIdentityBindings),
		"AzureAssignedIdentity":     world.Custom.Resource(aadpodidentity.AzureAssignedIdentities),
		"AzurePodIdentityException": world.Custom.Resource(aadpodidentity.AzurePodIdentityExceptions),
	}
	remove = sync.OnceFunc(func() {
		assert.NoError(s.t, resources[kind].Namespace(namespace).Delete(s.t.Context(), name, metav1.DeleteOptions{}))
	})
	s.t.Cleanup(func() {
		_ = resources[kind].Namespace(namespace).Delete(context.Background(), name, metav1.DeleteOptions{}) // may be gone already
	})
	return remove
}

func (s *scenario) identity(namespace, name string, id imdstest.Identity) (remove func()) {
	return s.put("AzureIdentity", namespace, name, map[string]any{"spec": map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID}})
}

func (s *scenario) binding(namespace, name, identity, selector string) (remove func()) {
	return s.put("AzureIdentityBinding", namespace, name, map[string]any{"spec": map[string]any{"azureIdentity": identity, "selector": selector}})
}

// hears waits until the pod gets this identity's token, or status 400 for "".
func (p *pod) hears(request, subject string) {
	p.t.Helper()
	var got answer
	require.Eventually(p.t, func() bool {
		got = p.asks(request)
		return got.subject == subject && (subject != "" || got.status == 400)
	}, patience, 20*time.Millisecond, "%q, and not %+v", subject, &got)
}

func TestAnIdentityIsValidThenWrongThenUpdatedThenRemoved(t *testing.T) {
	s := begin(t)
	p := s.pod("solo-0", "10.244.0.41", testbed.Ptp, "solo")
	s.agent()
	removeIdentity := s.identity("shop", "solo", cart)
	removeBinding := s.binding("shop", "solo", "solo", "solo")
	p.hears(vault, cart.ClientID)
	s.identity("shop", "solo", imdstest.Identity{ClientID: "00000000-0000-4000-8000-00000000dead"}) // one that IMDS does not know
	p.hears(vault, "")
	s.identity("shop", "solo", report)
	p.hears(vault, report.ClientID)
	s.binding("shop", "solo", "solo", "Solo") // not the pod's label
	p.hears(vault, "")
	s.binding("shop", "solo", "solo", "solo")
	p.hears(vault, report.ClientID)
	removeIdentity()
	p.hears(vault, "")
	s.identity("shop", "solo", cart)
	p.hears(vault, cart.ClientID)
	removeBinding()
	p.hears(vault, "")
}

func TestOfSeveralIdentitiesThoseThatRemainGoOn(t *testing.T) {
	s := begin(t)
	s.agent()
	p := s.pod("many-0", "10.244.0.42", testbed.Ptp, "many")
	remaining := map[string]string{cart.ClientID: "cart", report.ClientID: "report", third.ClientID: "third"}
	removals := map[string]func(){}
	for _, id := range []imdstest.Identity{cart, report, third} {
		name := "many-" + remaining[id.ClientID]
		s.identity("shop", name, id)
		removals[id.ClientID] = s.binding("shop", name, name, "many")
	}
	order := []string{cart.ClientID, report.ClientID, third.ClientID}
	rand.New(rand.NewPCG(5, 6)).Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	for _, goes := range order {
		for id := range remaining {
			p.hears(vault+"&client_id="+id, id)
		}
		removals[goes]()
		delete(remaining, goes)
		p.hears(vault+"&client_id="+goes, "")
	}
	p.hears(vault, "")
}

func TestFortyPodsAtOnce(t *testing.T) {
	s := begin(t)
	s.agent("--pod-wait=20s")
	var asking sync.WaitGroup
	for i := range 40 {
		binding, want := "cart", cart.ClientID
		if i%2 == 1 {
			binding, want = "report", report.ClientID
		}
		p := s.network(fmt.Sprintf("10.244.1.%d", i+1), testbed.Ptp)
		asking.Go(func() { assert.Equal(t, want, p.asks(vault).subject) }) // before there is a pod
		s.object("shop", fmt.Sprintf("forty-%d", i), p.Addr.String(), map[string]string{"aadpodidbinding": binding})
	}
	asking.Wait()
	assert.LessOrEqual(t, world.IMDS.Requests(), 2, "one for each identity")
}

func TestAPodsLabelChangesItsIdentity(t *testing.T) {
	s := begin(t)
	s.agent()
	p := s.pod("label-0", "10.244.0.43", testbed.Ptp, "cart")
	p.hears(vault, cart.ClientID)
	relabel := func(value string) {
		patch := fmt.Sprintf(`{"metadata":{"labels":{"aadpodidbinding":%q}}}`, value)
		_, err := world.Kube.CoreV1().Pods("shop").Patch(t.Context(), "label-0", "application/merge-patch+json", []byte(patch), metav1.PatchOptions{})
		require.NoError(t, err)
	}
	relabel("report")
	p.hears(vault, report.ClientID)
	relabel("nothing")
	p.hears(vault, "")
}

func TestTheSameNamesInTwoNamespacesAreTwoThings(t *testing.T) {
	s := begin(t)
	s.agent()
	s.identity("kube-system", "cart", report) // in shop it is cart's
	s.binding("kube-system", "cart", "cart", "cart")
	here := s.pod("twin", "10.244.0.44", testbed.Ptp, "cart")
	there := s.network("10.244.0.45", testbed.Ptp)
	s.object("kube-system", "twin", "10.244.0.45", map[string]string{"aadpodidbinding": "cart"})
	here.hears(vault, cart.ClientID)
	there.hears(vault, report.ClientID)
	assert.Equal(t, 400, here.asks(vault+"&client_id="+report.ClientID).status)
}

func TestStrictSelectionAsksForAnID(t *testing.T) {
	s := begin(t)
	s.agent("--strict-identity-selection")
	p := s.pod("several-0", "10.244.0.46", testbed.Ptp, "several")
	for name, id := range map[string]imdstest.Identity{"several-a": cart, "several-b": report} {
		s.identity("shop", name, id)
		s.binding("shop", name, name, "several")
	}
	p.hears(vault+"&client_id="+report.ClientID, report.ClientID)
	p.hears(vault+"&client_id="+cart.ClientID, cart.ClientID)
	got := p.asks(vault)
	assert.Equal(t, 400, got.status)
	assert.Contains(t, got.body, "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request")
}

// assignment is what MIC writes for a pod of namespace shop.
func (s *scenario) assignment(name, pod, state string, id imdstest.Identity) (remove func()) {
	return s.put("AzureAssignedIdentity", "default", name, map[string]any{
		"labels": map[string]any{"nodename": testbed.NodeName, "podname": pod},
		"spec": map[string]any{
			"azureIdentityRef": map[string]any{
				"metadata": map[string]any{"name": name, "namespace": "shop"},
				"spec":     map[string]any{"type": int64(0), "clientID": id.ClientID, "resourceID": id.ResourceID},
			},
			"azureBindingRef": map[string]any{
				"metadata": map[string]any{"name": name, "namespace": "shop"},
				"spec":     map[string]any{"azureIdentity": name, "selector": "standard"},
			},
			"pod": pod, "podNamespace": "shop", "nodename": testbed.NodeName,
		},
		"status": map[string]any{"status": state},
	})
}

func TestStandardModeGoesByWhatMICAssigned(t *testing.T) {
	s := begin(t)
	hasty := s.agent("--operation-mode=standard", "--identity-wait=1s")
	p := s.pod("standard-0", "10.244.0.47", testbed.Ptp, "standard")
	p.hears(vault, "") // at once: no binding could give it anything

	s.identity("shop", "standard", cart)
	s.binding("shop", "standard", "standard", "standard")
	p.hearsNotYet()
	remove := s.assignment("standard", "standard-0", "Created", cart)
	p.hearsNotYet()
	s.assignment("standard", "standard-0", "", cart) // as old versions of MIC wrote it
	p.hears(vault, cart.ClientID)
	remove()
	p.hearsNotYet()

	s.successor("--operation-mode=standard", "--identity-wait=20s")
	s.stops(hasty)
	heard := make(chan answer, 1)
	go func() { heard <- p.asks(vault) }()
	s.assignment("standard", "standard-0", "Assigned", cart)
	got := <-heard // it waited for the assignment, or came after it
	assert.Equal(t, cart.ClientID, got.subject, got.body)
	assert.Equal(t, 400, p.asks(vault+"&client_id="+report.ClientID).status, "no binding gives it that one")
}

// hearsNotYet waits until the pod is told to come back.
func (p *pod) hearsNotYet() {
	p.t.Helper()
	require.Eventually(p.t, func() bool {
		got := p.asks(vault)
		return got.status == 503 && got.retryAfter != ""
	}, patience, 20*time.Millisecond)
}

func TestExplainSaysWhoMayUseWhatAndWhy(t *testing.T) {
	s := begin(t)
	s.object("shop", "explained", "10.244.0.48", map[string]string{"aadpodidbinding": "cart"})
	s.binding("shop", "shouting", "cart", "CART")
	s.binding("kube-system", "elsewhere", "cart", "cart")
	explain := func(args ...string) (int, string) {
		code, output, err := testbed.RunAgent([]string{"KUBECONFIG=" + world.Kubeconfig}, append([]string{"explain", "--operation-mode=managed"}, args...)...)
		require.NoError(t, err)
		return code, output
	}
	code, output := explain("shop/explained")
	assert.Zero(t, code, output)
	for _, line := range []string{
		"pod shop/explained, 10.244.0.48\n",
		"gets by default AzureIdentity shop/cart (user-assigned managed identity, client ID " + cart.ClientID,
		`√ binding     AzureIdentityBinding "cart" has the selector "cart" and gives it AzureIdentity "cart"`,
		`              AzureIdentityBinding shop/shouting does not match: its selector "CART" differs in case`,
		`              AzureIdentityBinding kube-system/elsewhere does not match: it is in another namespace`,
	} {
		assert.Contains(t, output, line)
	}
	code, output = explain("shop/nobody")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "nmi: pod shop/nobody not found")
	code, output = explain("nobody")
	assert.Equal(t, 1, code)
	assert.Contains(t, output, "explain takes one argument: <namespace>/<pod>")
}
