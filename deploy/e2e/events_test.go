//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// eventsOn returns the Events about an object, by reason.
func (s *scenario) eventsOn(namespace, name string) map[string]eventsv1.Event {
	s.t.Helper()
	list, err := world.Kube.EventsV1().Events(namespace).List(context.Background(), metav1.ListOptions{FieldSelector: "reportingController=nmi"})
	require.NoError(s.t, err)
	byReason := make(map[string]eventsv1.Event)
	for _, event := range list.Items {
		if event.Regarding.Name == name {
			byReason[event.Reason] = event
		}
	}
	return byReason
}

// awaitEvent waits for an Event about a pod of namespace shop, with these words and at least as many occurrences.
func (s *scenario) awaitEvent(name, reason, words string, count int32) (event eventsv1.Event) {
	s.t.Helper()
	require.Eventually(s.t, func() bool {
		var there bool
		event, there = s.eventsOn("shop", name)[reason]
		return there && (count < 2 || event.Series != nil && event.Series.Count >= count)
	}, patience, 50*time.Millisecond, "%s on %s: there are %v", reason, name, s.eventsOn("shop", name))
	assert.Contains(s.t, event.Note, words)
	return event
}

// A pod that is refused has an Event with the reason and the fix, written with the rights that the
// chart gives.
func TestEvents(t *testing.T) {
	s := begin(t)
	s.createNode(testbed.NodeName)
	a := s.agentOf(s.account("nmi-events", chartRights(t, "defaults.yaml", "ClusterRole", "nmi")), "--pod-wait=100ms")
	require.NoError(t, a.AwaitReady(t.Context()))
	s.binding("shop", "dangling", "nowhere", "dangling")
	s.identity("kube-system", "elsewhere", cart)
	s.binding("kube-system", "elsewhere", "elsewhere", "elsewhere")

	for i, tc := range []struct{ binding, reason, words, fix string }{
		{"nothing", "NoIdentityBound", `no AzureIdentityBinding in namespace "shop" has the selector "nothing"`, "create an AzureIdentityBinding"},
		{"CART", "SelectorCaseDiffers", `has the selector "CART"`, `to "cart"`},
		{"dangling", "IdentityMissing", `names AzureIdentity "nowhere"`, "create AzureIdentity shop/nowhere"},
		{"elsewhere", "BindingInOtherNamespace", `has the selector "elsewhere"`, `in namespace "shop"`},
	} {
		name := fmt.Sprintf("refused-%d", i)
		p := s.pod(name, fmt.Sprintf("10.244.0.%d", 100+i), testbed.Ptp, tc.binding)
		require.Eventually(t, func() bool { return p.asks(vault).status == 400 }, patience, 10*time.Millisecond) // 503 until it is known
		event := s.awaitEvent(name, tc.reason, tc.words, 1)
		assert.Contains(t, event.Note, ". Fix: ")
		assert.Contains(t, event.Note, tc.fix)
		assert.NotContains(t, event.Note, "kube-system", "a pod's namespace may not read of another one")
		assert.Equal(t, "Warning", event.Type)
	}

	// The same again counts in the same Event.
	again := s.pod("refused-again", "10.244.0.110", testbed.Ptp, "nothing")
	require.Eventually(t, func() bool { return again.asks(vault).status == 400 }, patience, 10*time.Millisecond)
	first := s.awaitEvent("refused-again", "NoIdentityBound", "nothing", 1)
	for range 2 {
		assert.Equal(t, 400, again.asks(vault).status)
	}
	last := s.awaitEvent("refused-again", "NoIdentityBound", "nothing", 3)
	assert.Equal(t, first.Name, last.Name)
	assert.Equal(t, int32(3), last.Series.Count)

	// IMDS does not know what is bound.
	unknown := s.pod("unknown-0", "10.244.0.111", testbed.Ptp, "cart")
	world.IMDS.Inject(imdstest.Fault{Status: 400, Body: `{"error":"invalid_request","error_description":"Identity not found"}`})
	require.Eventually(t, func() bool { return unknown.asks(vault).status == 400 }, patience, 10*time.Millisecond)
	s.awaitEvent("unknown-0", "IdentityUnknownToIMDS", "assign the identity", 1)

	assert.NotContains(t, a.Log(), "may not write events")
}

// Without the right there is one line in the log, and no Event.
func TestNoRightToEvents(t *testing.T) {
	s := begin(t)
	var rights []right
	for _, r := range chartRights(t, "defaults.yaml", "ClusterRole", "nmi") {
		if r.resource != "events" {
			rights = append(rights, r)
		}
	}
	a := s.agentOf(s.account("nmi-no-events", rights), "--pod-wait=100ms")
	require.NoError(t, a.AwaitReady(t.Context()))
	const line = "the agent's service account may not write events"
	for i := range 3 {
		name := fmt.Sprintf("silent-%d", i)
		p := s.pod(name, fmt.Sprintf("10.244.0.%d", 112+i), testbed.Ptp, "nothing")
		require.Eventually(t, func() bool { return p.asks(vault).status == 400 }, patience, 10*time.Millisecond)
		s.says(a, line)
		assert.Empty(t, s.eventsOn("shop", name))
	}
	assert.Equal(t, 1, strings.Count(a.Log(), line))
	assert.Contains(t, a.Log(), `cannot create resource`)
	served := s.pod("silent-served", "10.244.0.116", testbed.Ptp, "cart")
	served.hears(vault, cart.ClientID)
}
