package podresolver

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// TestLateServiceAccount: a pod's event may come before that of its service account.
func TestLateServiceAccount(t *testing.T) {
	pod := resolvertest.Pod("p", addr.String(), "")
	h := newHarness(t, on(Config{}), pod)
	h.update()
	for _, want := range []Selector{{}, {ClientID: fedClient}} {
		_, err := h.Owner(addr).Identity(want)
		require.ErrorIs(t, err, ErrServiceAccount)
		assert.NotErrorIs(t, err, ErrNoIdentity, "which would be final")
	}
	assert.Contains(t, h.explain(t), "failed account: ServiceAccount shop/cart is not known")
	h.put(annotated(fedClient))
	h.update()
	_, err := h.Owner(addr).Identity(Selector{})
	require.NoError(t, err)

	none := resolvertest.With(resolvertest.Pod("p", addr.String(), ""), func(p *corev1.Pod) { p.Spec.ServiceAccountName = "" })
	static := newHarness(t, on(Config{}), none)
	_, err = static.decide(none).Identity(Selector{})
	require.ErrorIs(t, err, ErrNoIdentity, "the pod has no identity to wait for")
	static.put(none)
	assert.Contains(t, static.explain(t), "ok account: it has no service account")
	assert.NotContains(t, static.explain(t), "or annotate")

	bound := newHarness(t, on(Config{}), resolvertest.Pod("p", addr.String(), "x"), resolvertest.Identity("i", cartClient, ""), resolvertest.Binding("b", "x", "i"))
	bound.update()
	_, err = bound.Owner(addr).Identity(Selector{})
	require.NoError(t, err, "what is bound does not wait")
	_, err = bound.Owner(addr).Identity(Selector{ClientID: fedClient})
	require.ErrorIs(t, err, ErrServiceAccount)
}

// TestServiceAccountChanges: another annotation or UID is another identity; those of other
// service accounts change nothing.
func TestServiceAccountChanges(t *testing.T) {
	h := newHarness(t, on(Config{}), resolvertest.Pod("p", addr.String(), ""), annotated(fedClient))
	h.update()
	got := func() Identity {
		h.update()
		id, err := h.Owner(addr).Identity(Selector{})
		require.NoError(t, err)
		return id
	}
	before, first := h.Owner(addr), got()
	h.put(resolvertest.In("bank", annotated(fedOther)), resolvertest.ServiceAccount("other", nil))
	h.update()
	assert.Same(t, before, h.Owner(addr))
	h.put(annotated(fedOther))
	assert.Equal(t, fedOther, got().ClientID)
	recreated := annotated(fedClient)
	recreated.UID = "another"
	h.put(recreated)
	assert.NotEqual(t, first.Principal, got().Principal)
	h.drop(recreated)
	h.update()
	_, err := h.Owner(addr).Identity(Selector{})
	require.ErrorIs(t, err, ErrServiceAccount)
}

// TestTrimmedServiceAccount: no more is kept than a valid annotation needs, whatever authors write.
func TestTrimmedServiceAccount(t *testing.T) {
	long := strings.Repeat("ü", 100_000)
	info := newAccountInfo(annotated(long, TenantIDAnnotation, long, AdditionalClientIDsAnnotation, strings.Repeat(long+",", 2), "other", long))
	assert.Len(t, info.annotations.clientID, maxMalformed+len("…"), "cut")
	assert.Len(t, info.annotations.tenantID, maxTenant-1+len("…"))
	assert.Empty(t, info.annotations.additional)
	assert.Zero(t, info.annotations.malformedCount, "the same as the first")
	assert.Nil(t, newAccountInfo(resolvertest.ServiceAccount("a", map[string]string{"other": long})).annotations)
}

// TestServiceAccountMemory: every agent keeps all service accounts of the cluster, and who may annotate
// one writes what they like.
func TestServiceAccountMemory(t *testing.T) {
	valid, odd := make([]string, 30), make([]string, 30)
	for i := range valid {
		valid[i], odd[i] = resolvertest.GUID(fmt.Sprint(i)), fmt.Sprint(i, strings.Repeat("x", 5000))
	}
	a := newAccountInfo(annotated(odd[0], TenantIDAnnotation, odd[0], AdditionalClientIDsAnnotation, strings.Join(slices.Concat(odd, valid), ","))).annotations
	assert.Equal(t, 29, a.malformedCount)
	assert.Less(t, len(a.clientID)+len(a.tenantID)+len(a.malformed)+len(strings.Join(a.additional, "")), 1200, "bytes")
}

// TestPodsOf: a token is bound to a pod that stays.
func TestPodsOf(t *testing.T) {
	at := func(created int64, name string, changes ...func(*corev1.Pod)) *corev1.Pod {
		p := resolvertest.Pod(name, "", "")
		p.CreationTimestamp = metav1.NewTime(time.Unix(created, 0))
		return resolvertest.With(p, changes...)
	}
	deleted := func(after time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) { end := metav1.NewTime(time.Now().Add(after)); p.DeletionTimestamp = &end }
	}
	h := newHarness(t, Config{},
		at(1, "going", deleted(time.Hour)), at(1, "gone", deleted(-time.Hour)), at(3, "young"), at(2, "old"),
		at(4, "host", func(p *corev1.Pod) { p.Spec.HostNetwork = true }),
		at(1, "done", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		at(1, "anothers", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "other" }),
		resolvertest.In("bank", at(1, "elsewhere")),
	)
	assert.Equal(t, []BoundPod{{"old", "uid-of-old"}, {"young", "uid-of-young"}, {"host", "uid-of-host"}, {"going", "uid-of-going"}},
		h.PodsOf(ServiceAccount{Namespace: "shop", Name: "cart"}))
}

// TestForbiddenServiceAccounts: the message names the role that is missing.
func TestForbiddenServiceAccounts(t *testing.T) {
	forbidden := apierrors.NewForbidden(serviceAccounts.GroupResource(), "", errors.New("no role"))
	assert.ErrorContains(t, explainAPIError("serviceaccounts", forbidden), "apply its ClusterRole (deploy/federation/service-accounts.yaml)")
	assert.ErrorContains(t, explainAPIError("pods", forbidden), "apply its ClusterRole (deploy/manifests/account.yaml)")
}
