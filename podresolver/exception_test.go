package podresolver

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

func TestExceptions(t *testing.T) {
	for name, tc := range map[string]struct {
		pod, except map[string]string
		want        bool
	}{
		"one label of several suffices":  {map[string]string{"app": "x"}, map[string]string{"app": "x", "tier": "y"}, true},
		"the other labels do not matter": {map[string]string{"app": "x", "tier": "z"}, map[string]string{"app": "x", "tier": "y"}, true},
		"value in another case":          {map[string]string{"app": "X"}, map[string]string{"app": "x"}, true},
		"key in another case":            {map[string]string{"App": "x"}, map[string]string{"app": "x"}, false},
		"another value":                  {map[string]string{"app": "z"}, map[string]string{"app": "x"}, false},
		"an empty value needs the key":   {map[string]string{"tier": "x"}, map[string]string{"app": ""}, false},
		"an empty value matches another": {map[string]string{"app": ""}, map[string]string{"app": ""}, true},
		"exception without labels":       {map[string]string{"app": "x"}, nil, false},
		"a pod without labels":           {nil, map[string]string{"app": "x"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			pod := resolvertest.Pod("p", "", "")
			pod.Labels = tc.pod
			for _, mode := range []Mode{Managed, Standard} {
				assert.Equal(t, tc.want, newHarness(t, Config{Mode: mode}, resolvertest.Exception("e", tc.except)).decide(pod).Exception() == "e")
			}
			abroad := newHarness(t, Config{}, resolvertest.In("bank", resolvertest.Exception("e", tc.except)))
			assert.Empty(t, abroad.decide(pod).Exception(), "in another namespace")
		})
	}
}

func TestFirstExceptionByNameApplies(t *testing.T) {
	app := map[string]string{"app": "x"}
	pod := resolvertest.Pod("p", "", "")
	pod.Labels = app
	h := newHarness(t, Config{}, resolvertest.Exception("c", app), resolvertest.Exception("a", app), resolvertest.Exception("b", app), resolvertest.Exception("0", map[string]string{"app": "y"}))
	assert.Equal(t, "a", h.decide(pod).Exception())
	h.drop(resolvertest.Exception("a", nil))
	assert.Equal(t, "b", h.decide(pod).Exception())
}

func TestExceptedPodHasNoIdentity(t *testing.T) {
	pod := resolvertest.Pod("p", "", "x")
	h := newHarness(t, Config{}, resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"), resolvertest.Exception("e", pod.Labels))
	p := h.decide(pod)
	assert.Equal(t, "e", p.Exception())
	assert.Empty(t, p.identities)
	// A caller that does not check Exception must not get a zero Identity without an error:
	// it would be used as the node's own.
	_, err := p.Identity(Selector{})
	assert.ErrorIs(t, err, ErrNoIdentity)
}

func TestMICPodsAreExcepted(t *testing.T) {
	mic := func(change func(*corev1.Pod)) *corev1.Pod {
		controller := true
		p := resolvertest.Pod("mic-5d9f8c7b6-abcde", "", "")
		p.Namespace = "kube-system"
		p.Labels = map[string]string{"pod-template-hash": "5d9f8c7b6"}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "mic-5d9f8c7b6", Controller: &controller}}
		if change != nil {
			change(p)
		}
		return p
	}
	for name, tc := range map[string]struct {
		pod       *corev1.Pod
		namespace string // Config.MICNamespace
		want      bool
	}{
		"a pod of the Deployment":          {mic(nil), "kube-system", true},
		"no MIC namespace":                 {mic(nil), "", false},
		"another MIC namespace":            {mic(nil), "mic", false},
		"no owner":                         {mic(func(p *corev1.Pod) { p.OwnerReferences = nil }), "kube-system", false},
		"an owner that does not control":   {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Controller = nil }), "kube-system", false},
		"another hash than its own":        {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Name = "mic-foo" }), "kube-system", false},
		"a Deployment mic-foo":             {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Name = "mic-foo-5d9f8c7b6" }), "kube-system", false},
		"a Deployment micro":               {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Name = "micro-5d9f8c7b6" }), "kube-system", false},
		"a ReplicaSet mic of its own":      {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Name = "mic" }), "kube-system", false},
		"no hash":                          {mic(func(p *corev1.Pod) { p.Labels = nil }), "kube-system", false},
		"an empty hash":                    {mic(func(p *corev1.Pod) { p.Labels["pod-template-hash"] = ""; p.OwnerReferences[0].Name = "mic-" }), "kube-system", false},
		"owned by a Deployment":            {mic(func(p *corev1.Pod) { p.OwnerReferences[0].Kind = "Deployment" }), "kube-system", false},
		"owned by a ReplicaSet of another": {mic(func(p *corev1.Pod) { p.OwnerReferences[0].APIVersion = "example.com/v1" }), "kube-system", false},
	} {
		t.Run(name, func(t *testing.T) {
			got := newHarness(t, Config{Mode: Standard, MICNamespace: tc.namespace}).decide(tc.pod).Exception()
			assert.Equal(t, tc.want, got == micException, got)
			got = newHarness(t, Config{MICNamespace: tc.namespace}).decide(tc.pod).Exception()
			assert.Empty(t, got, "managed mode has no MIC")
		})
	}
	// An AzurePodIdentityException is reported first.
	pod := mic(nil)
	written := resolvertest.In("kube-system", resolvertest.Exception("written", pod.Labels))
	h := newHarness(t, Config{Mode: Standard, MICNamespace: "kube-system"}, written)
	assert.Equal(t, "written", h.decide(pod).Exception())
	// ExceptionNamespaces is about AzurePodIdentityExceptions.
	h = newHarness(t, Config{Mode: Standard, MICNamespace: "kube-system", ExceptionNamespaces: []string{}}, written)
	assert.Equal(t, micException, h.decide(pod).Exception())
}

func TestExceptionNamespaces(t *testing.T) {
	app := map[string]string{"app": "x", aadpodidentity.BindingLabel: "x"}
	here, there := resolvertest.Pod("p", "", ""), resolvertest.In("bank", resolvertest.Pod("p", "", ""))
	here.Labels, there.Labels = app, app
	objects := []any{resolvertest.Exception("e", app), resolvertest.Exception("d", app), resolvertest.In("bank", resolvertest.Exception("e", app))}
	for name, tc := range map[string]struct {
		namespaces  []string
		here, there string
	}{
		"not set":         {nil, "d", "e"},
		"none":            {[]string{}, "", ""},
		"one":             {[]string{"shop"}, "d", ""},
		"two":             {[]string{"bank", "shop"}, "d", "e"},
		"in another case": {[]string{"Shop"}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, mode := range []Mode{Managed, Standard} {
				h := newHarness(t, Config{Mode: mode, ExceptionNamespaces: tc.namespaces}, objects...)
				assert.Equal(t, tc.here, h.decide(here).Exception())
				assert.Equal(t, tc.there, h.decide(there).Exception())
			}
		})
	}
	h := newHarness(t, Config{ExceptionNamespaces: []string{"kube-system"}}, objects...)
	_, err := h.decide(here).Identity(Selector{})
	require.ErrorIs(t, err, ErrNoIdentity)
	assert.ErrorContains(t, err, `no AzureIdentityBinding in namespace "shop" has the selector "x"; AzurePodIdentityException "d" is ignored: namespace "shop" is not in --exception-namespaces`)

	h.put(resolvertest.Identity("i", resolvertest.GUID("c"), ""), resolvertest.Binding("b", "x", "i"))
	got, err := h.decide(here).Identity(Selector{})
	require.NoError(t, err, "the exception does not apply")
	assert.Equal(t, "i", got.Name)
}
