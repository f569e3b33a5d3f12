package podresolver

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// The objects and update against a reference implementation, over random sequences of events,
// including some that no reflector sends.

type kubeObject interface {
	metav1.Object
	runtime.Object
}

// modelStore is one kind of objects: the current ones, and the store under test.
type modelStore struct {
	live map[cache.ObjectName]kubeObject
	past []kubeObject // for events that arrive out of order
	to   store
	make func(*machine) kubeObject
	refs []cache.ObjectName
}

type machine struct {
	t        testing.TB
	pick     func(n int) int
	h        *harness
	stores   []*modelStore // pods, identities, bindings, exceptions, assigned, accounts
	expiry   <-chan time.Time
	affected map[cache.ObjectName]bool // since the last decision
}

var (
	modelAddrs     = []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"}
	modelQuestions = []Selector{
		{}, {ClientID: strings.ToUpper(modelClient0)}, {ClientID: modelClient1}, {ClientID: modelClient2}, {ResourceID: strings.ToUpper(modelPath0)}, {ObjectID: modelClient0}, {ClientID: "c9"},
	}
)

const (
	modelClient0 = "c0000000-0000-4000-8000-000000000000"
	modelClient1 = "c1000000-0000-4000-8000-000000000000"
	modelClient2 = "c2000000-0000-4000-8000-000000000000" // service accounts alone have it
	modelPath0   = "/subscriptions/s/resourcegroups/r/providers/microsoft.managedidentity/userassignedidentities/0"
	modelPath1   = "/subscriptions/S/resourceGroups/R/providers/Microsoft.ManagedIdentity/userAssignedIdentities/1"
)

func newMachine(tb testing.TB, pick func(int) int) *machine {
	tb.Helper()
	cfg := []Config{{}, {Mode: Standard}, {Mode: Standard, Namespaced: true}}[pick(3)]
	cfg.ExceptionNamespaces = [][]string{nil, nil, {"a"}, {}}[pick(4)]
	cfg.Deny = []DenyList{{}, {}, {ClientIDs: []string{modelClient0}}, {ResourceIDs: []string{modelPath0}}}[pick(4)]
	cfg.Federation = []Federation{{}, {TenantID: "cluster"}, {ServiceAccounts: true}, {ServiceAccounts: true, TenantID: "cluster", Authority: "https://login.example"}}[pick(4)]
	m := &machine{t: tb, pick: pick, h: newHarness(tb, cfg), affected: make(map[cache.ObjectName]bool)}
	s := m.h.stores
	refs := func(namespaces []string, names ...string) (all []cache.ObjectName) {
		for _, namespace := range namespaces {
			for _, name := range names {
				all = append(all, cache.NewObjectName(namespace, name))
			}
		}
		return all
	}
	both := []string{"a", "b"}
	m.stores = []*modelStore{
		{to: s.pods, make: (*machine).pod, refs: refs(both, "p0", "p1", "p2")},
		{to: s.identities, make: (*machine).identity, refs: refs(both, "i0", "i1")},
		{to: s.bindings, make: (*machine).binding, refs: refs(both, "b0", "b1", "b2")},
		{to: s.exceptions, make: (*machine).exception, refs: refs(both, "e0", "e1")},
		{to: s.assigned, make: (*machine).assignment, refs: append(refs([]string{micAssignments}, "a0", "a1"), cache.NewObjectName("a", "a2"), cache.NewObjectName("b", "a3"))},
		{to: s.accounts, make: (*machine).account, refs: refs(both, "s0", "s1")},
	}
	for _, s := range m.stores {
		s.live = make(map[cache.ObjectName]kubeObject)
	}
	m.expiry = m.h.update()
	return m
}

func choose[T any](m *machine, from ...T) T { return from[m.pick(len(from))] }

// soon is now or in the next seconds.
func (m *machine) soon() *metav1.Time {
	at := metav1.NewTime(time.Now().Add(time.Duration(m.pick(10)) * time.Second))
	return &at
}

func (m *machine) pod() kubeObject {
	p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: choose(m, "node1", "node1", "node1", "node1", "node2"), HostNetwork: m.pick(8) == 1}}
	p.Spec.ServiceAccountName = choose(m, "s0", "s0", "s1", "")
	p.UID = choose[types.UID](m, "1", "2", "3")
	p.CreationTimestamp = metav1.NewTime(time.Unix(int64(m.pick(3)), 0))
	if m.pick(3) == 1 {
		p.DeletionTimestamp = m.soon()
	}
	p.Labels = map[string]string{"app": choose(m, "x", "X", "y")}
	if label := choose(m, "x", "y", "X", ""); m.pick(5) != 0 {
		p.Labels[aadpodidentity.BindingLabel] = label
	}
	p.Status.Phase = choose(m, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodPending, corev1.PodSucceeded, corev1.PodFailed)
	p.Status.PodIP = choose(m, append([]string{""}, modelAddrs...)...)
	if p.Status.PodIP != "" && m.pick(2) == 0 {
		p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}, {IP: choose(m, modelAddrs...)}}
	}
	// Derived from the choices above, so that seeds keep their meaning.
	variety := len(p.Status.PodIP) + int(p.CreationTimestamp.Unix()) + int(p.UID[0]) + len(p.Status.PodIPs)
	for i := range variety % 3 {
		containers([]corev1.ContainerState{runningState, terminatedState, waitingState}[(variety/3+i)%3])(p)
	}
	return p
}

func (m *machine) identity() kubeObject {
	id := &aadpodidentity.AzureIdentity{Spec: aadpodidentity.AzureIdentitySpec{
		Type:       choose(m, aadpodidentity.UserAssignedMSI, aadpodidentity.ServicePrincipal),
		ClientID:   choose(m, strings.ToUpper(modelClient0), " "+modelClient0+"\n", modelClient1, "", "{"+modelClient0+"}"),
		ResourceID: choose(m, modelPath0+" ", modelPath1, " ", modelPath0+"/"),
	}}
	if id.Spec.Type == aadpodidentity.ServicePrincipal {
		id.Spec.TenantID = choose(m, "t", "t", "t", "")
		id.Spec.ClientPassword = aadpodidentity.SecretReference{Name: choose(m, "s", "s", "s", ""), Namespace: choose(m, "", "a", "b")}
	}
	if m.pick(6) == 1 {
		id.Spec.Unreadable = "odd"
	}
	id.Annotations = make(map[string]string)
	if m.pick(4) == 1 {
		id.Annotations[aadpodidentity.BehaviorAnnotation] = aadpodidentity.BehaviorNamespaced
	}
	if value := choose(m, "", "", "", "true", " TRUE\n", "false", "yes"); value != "" {
		id.Annotations[aadpodidentity.FederatedAnnotation] = value
		id.Spec.TenantID, id.Spec.ADEndpoint = choose(m, "", "t ", "a/b"), choose(m, "", "https://login.example/")
	}
	return id
}

func (m *machine) account() kubeObject {
	a := &metav1.PartialObjectMetadata{}
	a.UID = choose[types.UID](m, "1", "2")
	a.Annotations = map[string]string{
		ClientIDAnnotation:            choose(m, strings.ToUpper(modelClient0), " "+modelClient1, modelClient2, "odd", ""),
		TenantIDAnnotation:            choose(m, "", "", "t", "a/b"),
		AdditionalClientIDsAnnotation: choose(m, "", "", modelClient2, modelClient1+", odd,"+strings.ToUpper(modelClient0)),
	}
	return a
}

func (m *machine) binding() kubeObject {
	b := &aadpodidentity.AzureIdentityBinding{Spec: aadpodidentity.AzureIdentityBindingSpec{
		AzureIdentity: choose(m, "i0", "i1", "gone"), Selector: choose(m, "x", "y", "X", ""),
	}}
	b.CreationTimestamp = metav1.NewTime(time.Unix(int64(m.pick(3)), 0))
	return b
}

func (m *machine) exception() kubeObject {
	e := &aadpodidentity.AzurePodIdentityException{Spec: aadpodidentity.AzurePodIdentityExceptionSpec{PodLabels: map[string]string{}}}
	for range m.pick(3) {
		e.Spec.PodLabels[choose(m, "app", "App", aadpodidentity.BindingLabel)] = choose(m, "x", "Y", "none")
	}
	return e
}

func (m *machine) assignment() kubeObject {
	id, b := m.identity().(*aadpodidentity.AzureIdentity), m.binding().(*aadpodidentity.AzureIdentityBinding)
	if b.Spec.Selector == "" {
		b.Spec.Selector = "x" // MIC assigns nothing for an empty selector
	}
	id.Namespace, id.Name = choose(m, "a", "b"), choose(m, "i0", "i1")
	b.Namespace, b.Name = id.Namespace, choose(m, "b0", "b1")
	return &aadpodidentity.AzureAssignedIdentity{
		Spec: aadpodidentity.AzureAssignedIdentitySpec{
			AzureIdentityRef: id, AzureBindingRef: b, PodNamespace: choose(m, "a", "b"), Pod: choose(m, "p0", "p1"),
			NodeName: choose(m, "node1", "node1", "node1", "node2"),
		},
		Status: aadpodidentity.AzureAssignedIdentityStatus{Status: choose(m, "", "Assigned", "Created", "Unassigned")},
	}
}

// step is one event, often followed by an update.
func (m *machine) step() {
	s := choose(m, append(m.stores, m.stores[0], m.stores[2])...)
	at := choose(m, s.refs...)
	switch event := m.pick(16); event {
	case 0:
		time.Sleep(time.Duration(1+m.pick(5)) * time.Second)
	case 1, 2: // missed events, then a list
		for range m.pick(6) {
			if ref := choose(m, s.refs...); m.pick(2) == 0 {
				m.change(s, ref, nil)
			} else {
				m.change(s, ref, s.make(m))
			}
		}
		m.relist(s, event == 1)
	case 3: // a tombstone without the object
		m.change(s, at, nil)
		_ = s.to.Delete(cache.DeletedFinalStateUnknown{Key: at.Namespace + "/" + at.Name})
	case 4, 5:
		gone := s.live[at]
		m.change(s, at, nil)
		if gone != nil {
			_ = s.to.Delete(gone)
		}
	case 6: // an unchanged object, which affects no pod
		if o := s.live[at]; o != nil {
			_ = choose(m, s.to.Add, s.to.Update)(o.DeepCopyObject())
		}
	case 7: // an old version after a newer one
		if len(s.past) > 0 {
			o := choose(m, s.past...)
			m.change(s, cache.MetaObjectToName(o), o)
			_ = s.to.Update(o.DeepCopyObject())
		}
	default:
		o := s.make(m)
		m.change(s, at, o)
		_ = choose(m, s.to.Add, s.to.Update)(o.DeepCopyObject())
	}
	if m.pick(4) != 0 {
		m.decide()
	}
}

// change updates the current objects, and records the affected pods.
func (m *machine) change(s *modelStore, at cache.ObjectName, o kubeObject) {
	if before := s.live[at]; before != nil {
		m.touch(before)
		s.past = append(s.past, before)
		delete(s.live, at)
	}
	if o != nil {
		o.SetNamespace(at.Namespace)
		o.SetName(at.Name)
		if uid := o.GetUID(); len(uid) == 1 { // UIDs are unique
			o.SetUID(uid + types.UID(at.Namespace+at.Name))
		}
		s.live[at] = o
		m.touch(o)
	}
}

func (m *machine) touch(o kubeObject) {
	for _, pod := range m.reference().affects(o) {
		m.affected[pod] = true
	}
}

func (m *machine) relist(s *modelStore, streamed bool) {
	var list []any
	for _, o := range s.live {
		var item any = o.DeepCopyObject()
		if streamed {
			item, _ = s.to.Transformer()(item)
		}
		list = append(list, item)
	}
	_ = s.to.Replace(list, "")
}

// decide does what Run does when it is woken, and compares with the reference.
func (m *machine) decide() {
	before := m.h.current.Load().byAddr
	select {
	case <-m.h.objects.wake:
		m.expiry = m.h.update()
	case <-m.expiry:
		m.expiry = m.h.update()
	default:
	}
	after := m.h.current.Load().byAddr

	known, reference := make(map[*Pod]bool), m.reference()
	for _, o := range before {
		known[o.pod] = true
	}
	expected := 0
	for _, text := range modelAddrs {
		addr := netip.MustParseAddr(text)
		want := reference.owner(addr, time.Now(), modelQuestions)
		if want != "" {
			expected++
		}
		got, p := "", after[addr].pod
		switch {
		case after[addr].err != nil:
			require.ErrorIs(m.t, after[addr].err, ErrAmbiguousAddress)
			got = "ambiguous"
		case p != nil:
			got = tell(p.Namespace, p.Name, p.UID, p.exception, modelQuestions, func(want Selector) string { return answerOf(m.t, p, want) })
		}
		require.Equal(m.t, want, got, addr)
		if was := before[addr].pod; p != nil && was != nil && was.UID == p.UID && was.String() == p.String() && !m.affected[cache.NewObjectName(p.Namespace, p.Name)] {
			require.True(m.t, known[p], "%s was decided again without a reason", p)
		}
	}
	require.Len(m.t, after, expected)
	clear(m.affected)
}

func answerOf(tb testing.TB, p *Pod, want Selector) string {
	tb.Helper()
	id, err := p.Identity(want)
	switch {
	case err == nil:
		return told(id.Namespace, id.Name, id.ClientID+" "+id.ResourceID, id.Binding, proofOf(id.Principal))
	case errors.Is(err, ErrNotAssigned):
		return "wait"
	case errors.Is(err, ErrServiceAccount):
		return "late"
	}
	require.ErrorIs(tb, err, ErrNoIdentity)
	return "none"
}

// proofOf tells whose tokens an identity gets, and how it proves itself.
func proofOf(p *Principal) string {
	switch {
	case p == nil:
		return "IMDS"
	case p.Federated():
		return fmt.Sprintf("%s at %s/%s", p.ServiceAccount, p.Authority, p.TenantID)
	default:
		return fmt.Sprintf("Secret %s/%s at %s/%s", p.SecretNamespace, p.SecretName, p.Authority, p.TenantID)
	}
}

func (m *machine) reference() *reference {
	return &reference{
		cfg: m.h.cfg, pods: liveOf[*corev1.Pod](m.stores[0]),
		identities: liveOf[*aadpodidentity.AzureIdentity](m.stores[1]),
		bindings:   liveOf[*aadpodidentity.AzureIdentityBinding](m.stores[2]),
		exceptions: liveOf[*aadpodidentity.AzurePodIdentityException](m.stores[3]),
		assigned:   liveOf[*aadpodidentity.AzureAssignedIdentity](m.stores[4]),
		accounts:   liveOf[*metav1.PartialObjectMetadata](m.stores[5]),
	}
}
