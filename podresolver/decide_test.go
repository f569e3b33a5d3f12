package podresolver

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

func identity(name, clientID, resourceID string) *aadpodidentity.AzureIdentity {
	return &aadpodidentity.AzureIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec:       aadpodidentity.AzureIdentitySpec{ClientID: clientID, ResourceID: resourceID},
	}
}

func binding(name, selector, identity string, age time.Duration) *aadpodidentity.AzureIdentityBinding {
	return &aadpodidentity.AzureIdentityBinding{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name,
			CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000, 0).Add(-age)),
		},
		Spec: aadpodidentity.AzureIdentityBindingSpec{Selector: selector, AzureIdentity: identity},
	}
}

func exception(name string, labels map[string]string) *aadpodidentity.AzurePodIdentityException {
	return &aadpodidentity.AzurePodIdentityException{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec:       aadpodidentity.AzurePodIdentityExceptionSpec{PodLabels: labels},
	}
}

func objects(all ...any) *namespaceObjects {
	ns := &namespaceObjects{identities: make(map[string]*aadpodidentity.AzureIdentity)}
	for _, obj := range all {
		switch o := obj.(type) {
		case *aadpodidentity.AzureIdentity:
			ns.identities[o.Name] = o
		case *aadpodidentity.AzureIdentityBinding:
			ns.bindings = append(ns.bindings, o)
		case *aadpodidentity.AzurePodIdentityException:
			ns.exceptions = append(ns.exceptions, o)
		}
	}
	sortBindings(ns.bindings)
	return ns
}

func podWith(labels map[string]string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart-0", Labels: labels}}
}

func TestWhichIdentityAPodGets(t *testing.T) {
	world := objects(
		identity("old", "C-OLD", "/subscriptions/S/old"),
		identity("new", "c-new", "/subscriptions/s/new"),
		identity("by-resource", "", "/subscriptions/s/by-resource"),
		identity("empty", "", ""),
		binding("b-new", "cart", "new", time.Hour),
		binding("a-new-again", "cart", "new", time.Minute),
		binding("z-old", "cart", "old", 2*time.Hour),
		binding("r", "resource", "by-resource", 0),
		binding("gone", "broken", "deleted", 0),
		binding("none", "broken", "empty", 0),
		binding("everyone", "", "old", time.Hour),
		binding("twin-b", "twins", "old", time.Hour),
		binding("twin-a", "twins", "new", time.Hour),
	)
	for name, tc := range map[string]struct {
		label string
		want  Selector
		gets  string // an identity's name, or "" for a refusal
		why   string // part of the refusal
	}{
		"names none, gets the oldest binding's":     {"cart", Selector{}, "old", ""},
		"of the same age, gets the first by name":   {"twins", Selector{}, "new", ""},
		"names one by client ID":                    {"cart", Selector{ClientID: "c-new"}, "new", ""},
		"names one in another case":                 {"cart", Selector{ClientID: "c-OLD"}, "old", ""},
		"names one by resource ID in another case":  {"cart", Selector{ResourceID: "/SUBSCRIPTIONS/s/New"}, "new", ""},
		"names one that is not bound to it":         {"resource", Selector{ClientID: "c-old"}, "", "none of the 1 bound"},
		"an empty client ID is not a wildcard":      {"resource", Selector{ResourceID: "/other"}, "", "none of the 1 bound"},
		"an object ID is never the default":         {"cart", Selector{ObjectID: "o"}, "", "none of the 2 bound"},
		"identity known by its resource ID alone":   {"resource", Selector{}, "by-resource", ""},
		"selector differs in case":                  {"Cart", Selector{}, "", `no AzureIdentityBinding in namespace "shop" has the selector "Cart"`},
		"no label":                                  {"", Selector{}, "", `it has no label "aadpodidbinding"`},
		"binding to an identity that is not there":  {"broken", Selector{}, "", `AzureIdentityBinding "gone" names AzureIdentity "deleted", which does not exist in this namespace`},
		"binding to an identity that names nothing": {"broken", Selector{}, "", `AzureIdentity "empty", which has neither clientID nor resourceID`},
	} {
		t.Run(name, func(t *testing.T) {
			labels := map[string]string{"app": "cart"}
			if tc.label != "" {
				labels[aadpodidentity.BindingLabel] = tc.label
			}
			got, err := decide(podWith(labels), world).Identity(tc.want)
			if tc.gets == "" {
				require.ErrorIs(t, err, ErrNoIdentity)
				assert.ErrorContains(t, err, tc.why)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.gets, got.Name)
		})
	}
}

func TestTwoBindingsOfOneIdentityCountOnce(t *testing.T) {
	p := decide(podWith(map[string]string{aadpodidentity.BindingLabel: "x"}), objects(
		identity("i", "c", ""), binding("a", "x", "i", 0), binding("b", "x", "i", 0)))
	assert.Len(t, p.identities, 1)
}

func TestAnEmptyLabelValueMatchesNoEmptySelector(t *testing.T) {
	p := decide(podWith(map[string]string{aadpodidentity.BindingLabel: ""}), objects(
		identity("i", "c", ""), binding("a", "", "i", 0)))
	_, err := p.Identity(Selector{})
	assert.ErrorIs(t, err, ErrNoIdentity)
}

func TestExceptions(t *testing.T) {
	for name, tc := range map[string]struct {
		pod, except map[string]string
		want        bool
	}{
		"one label of several suffices": {map[string]string{"app": "x"}, map[string]string{"app": "x", "tier": "y"}, true},
		"value in another case":         {map[string]string{"app": "X"}, map[string]string{"app": "x"}, true},
		"key in another case":           {map[string]string{"App": "x"}, map[string]string{"app": "x"}, false},
		"another value":                 {map[string]string{"app": "z"}, map[string]string{"app": "x"}, false},
		"an empty value needs the key":  {map[string]string{"tier": "x"}, map[string]string{"app": ""}, false},
		"no labels except nobody":       {map[string]string{"app": "x"}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := decide(podWith(tc.pod), objects(exception("e", tc.except)))
			assert.Equal(t, tc.want, p.Exception() == "e")
		})
	}
}

// TestWhoOwnsAnAddress tries each case in both orders of events.
func TestWhoOwnsAnAddress(t *testing.T) {
	addr := netip.MustParseAddr("10.244.0.7")
	pod := func(name string, change func(*corev1.Pod)) *corev1.Pod {
		p := podWith(nil)
		p.Name = name
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: addr.String(), PodIPs: []corev1.PodIP{{IP: addr.String()}, {IP: "fd00::7"}}}
		if change != nil {
			change(p)
		}
		return p
	}
	live := pod("live", nil)
	now := metav1.NewTime(time.Unix(1_700_000_000, 0))
	later := metav1.NewTime(now.Add(time.Second))
	for name, tc := range map[string]struct {
		pods  []*corev1.Pod
		owner string // "" for none
		err   error
	}{
		"the only one":             {[]*corev1.Pod{live}, "live", nil},
		"one that has succeeded":   {[]*corev1.Pod{pod("done", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })}, "", nil},
		"one that has failed":      {[]*corev1.Pod{live, pod("done", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })}, "live", nil},
		"one on the host network":  {[]*corev1.Pod{pod("host", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}, "", nil},
		"one that is on its way":   {[]*corev1.Pod{pod("new", func(p *corev1.Pod) { p.Status.PodIP = ""; p.Status.PodIPs = nil })}, "", nil},
		"by podIPs alone":          {[]*corev1.Pod{pod("ips", func(p *corev1.Pod) { p.Status.PodIP = "" })}, "ips", nil},
		"one that goes, one stays": {[]*corev1.Pod{live, pod("going", func(p *corev1.Pod) { p.DeletionTimestamp = &later })}, "live", nil},
		"one in its grace":         {[]*corev1.Pod{pod("going", func(p *corev1.Pod) { p.DeletionTimestamp = &later })}, "going", nil},
		"one past its grace":       {[]*corev1.Pod{pod("gone", func(p *corev1.Pod) { p.DeletionTimestamp = &now })}, "", nil},
		"two in their grace":       {[]*corev1.Pod{pod("a", func(p *corev1.Pod) { p.DeletionTimestamp = &later }), pod("b", func(p *corev1.Pod) { p.DeletionTimestamp = &later })}, "", ErrAmbiguousAddress},
		"two that stay":            {[]*corev1.Pod{live, pod("other", nil)}, "", ErrAmbiguousAddress},
		"an address that is none":  {[]*corev1.Pod{pod("odd", func(p *corev1.Pod) { p.Status.PodIP = "10.0.0"; p.Status.PodIPs = nil })}, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				var claims []claim
				for _, p := range tc.pods {
					claims = append(claims, claimsOf(p, decide(p, objects()))...)
				}
				s, _ := newSnapshot(claims, now.Time)
				got := s.byAddr[addr]
				if tc.owner == "" {
					assert.Nil(t, got.pod)
				} else if assert.NotNil(t, got.pod) {
					assert.Equal(t, tc.owner, got.pod.Name)
				}
				assert.ErrorIs(t, got.err, tc.err)
				slices.Reverse(tc.pods)
			}
		})
	}
}
