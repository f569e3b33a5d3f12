package podresolver

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// TestReasonsAndFixes: Explain and Hint agree on the reason, and each refusal says what to do.
func TestReasonsAndFixes(t *testing.T) {
	const other = "0defaced-0000-4000-8000-000000000001"
	labelled := func(key, value string) *corev1.Pod {
		p := resolvertest.Pod("p", "10.0.0.1", "")
		p.Labels = map[string]string{key: value}
		return p
	}
	cart := []any{resolvertest.Identity("cart", cartClient, ""), resolvertest.Binding("cart", "cart", "cart")}
	for name, tc := range map[string]struct {
		cfg         Config
		objects     []any
		want        Selector
		reason, fix string
		step        string // that fails; "" for none
	}{
		"all is well":              {objects: append(cart, labelled("aadpodidbinding", "cart"))},
		"no label":                 {objects: append(cart, labelled("app", "x")), reason: NoIdentityBound, fix: "label it (in its controller's template) aadpodidbinding=<selector", step: "binding"},
		"no binding":               {objects: append(cart, labelled("aadpodidbinding", "y")), reason: NoIdentityBound, fix: `create an AzureIdentityBinding with the selector "y" in namespace "shop"`, step: "binding"},
		"label key in other case":  {objects: append(cart, labelled("AadPodIdBinding", "cart")), reason: SelectorCaseDiffers, fix: `rename the pod's label "AadPodIdBinding"`, step: "binding"},
		"selector in other case":   {objects: append(cart, labelled("aadpodidbinding", "Cart")), reason: SelectorCaseDiffers, fix: `set the pod's label aadpodidbinding (in its controller's template) to "cart", the selector of AzureIdentityBinding shop/cart`, step: "binding"},
		"binding elsewhere":        {objects: []any{resolvertest.In("bank", resolvertest.Binding("far", "cart", "cart")), labelled("aadpodidbinding", "cart")}, reason: BindingInOtherNamespace, fix: `in namespace "shop", with the selector "cart"`, step: "binding"},
		"elsewhere, in other case": {objects: []any{resolvertest.In("bank", resolvertest.Binding("far", "CART", "cart")), labelled("aadpodidbinding", "cart")}, reason: BindingInOtherNamespace, fix: `with the selector "cart"`, step: "binding"},
		"both, the near one":       {objects: []any{resolvertest.In("bank", resolvertest.Binding("a", "cart", "cart")), resolvertest.Binding("b", "CART", "cart"), labelled("aadpodidbinding", "cart")}, reason: SelectorCaseDiffers, fix: `AzureIdentityBinding shop/b`, step: "binding"},
		"identity missing":         {objects: []any{resolvertest.Binding("b", "cart", "gone"), labelled("aadpodidbinding", "cart")}, reason: IdentityMissing, fix: "create AzureIdentity shop/gone, or correct azureIdentity in AzureIdentityBinding shop/b", step: "binding"},
		"identity malformed":       {objects: []any{resolvertest.Identity("odd", "odd", ""), resolvertest.Binding("b", "cart", "odd"), labelled("aadpodidbinding", "cart")}, reason: IdentityUnusable, fix: "correct AzureIdentity shop/odd", step: "binding"},
		"exception in other case":  {objects: []any{resolvertest.Exception("e", map[string]string{"app": "x"}), labelled("App", "x")}, reason: SelectorCaseDiffers, fix: `rename the pod's label "App" to "app"`, step: "binding"},
		"exception elsewhere":      {objects: []any{resolvertest.In("bank", resolvertest.Exception("e", map[string]string{"app": "x"})), labelled("app", "x")}, reason: NoIdentityBound, fix: "label it", step: "binding"},
		"another is requested":     {objects: append(cart, labelled("aadpodidbinding", "cart")), want: Selector{ClientID: other}, reason: RequestedIdentityMissing, fix: "request an identity that the pod has", step: "identity"},
		"several": {
			cfg: Config{StrictSelection: true}, objects: append(cart, resolvertest.Identity("two", other, ""), resolvertest.Binding("two", "cart", "two"), labelled("aadpodidbinding", "cart")),
			reason: SeveralIdentities, fix: "name one in the request", step: "identity",
		},
		"not assigned":            {cfg: Config{Mode: Standard}, objects: append(cart, labelled("aadpodidbinding", "cart")), reason: NotAssigned, fix: "see whether MIC runs", step: "assignment"},
		"the assignment does not": {cfg: Config{Mode: Standard}, objects: []any{resolvertest.Assigned("a", "p", "Assigned", resolvertest.Identity("odd", "odd", ""), resolvertest.Binding("b", "cart", "odd")), labelled("aadpodidbinding", "cart")}, reason: IdentityUnusable, fix: "see why in MIC's log", step: "assignment"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, tc.cfg, tc.objects...)
			h.update()
			d, err := h.Explain("shop", "p", tc.want, nil)
			require.NoError(t, err)
			assert.Equal(t, tc.reason, d.Reason)
			assert.Contains(t, d.Fix, tc.fix)
			failed := ""
			for _, step := range d.Steps {
				assert.NotEmpty(t, step.Texts, step.Name)
				if step.State == Failed {
					failed += step.Name
					assert.Equal(t, d.Fix, step.Fix)
				}
			}
			assert.Equal(t, tc.step, failed)

			pod, err := h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
			require.NoError(t, err)
			_, err = pod.Identity(tc.want)
			require.Equal(t, tc.reason == "", err == nil)
			reason := h.Hint(err).Reason
			assert.Equal(t, tc.reason, reason, "to the log")
			if err != nil {
				assert.NotEmpty(t, Reason(err))
			}
		})
	}
	assert.Empty(t, Reason(errors.New("another's")))
}

// Who may write bindings can write any number.
func TestExplanationsAreBounded(t *testing.T) {
	objects := []any{resolvertest.Pod("p", "10.0.0.1", "x")}
	for i := range 100 {
		objects = append(objects, resolvertest.Binding(fmt.Sprint("b", i), "x", "gone"))
	}
	h := newHarness(t, Config{}, objects...)
	h.update()
	d, err := h.Explain("shop", "p", Selector{}, nil)
	require.NoError(t, err)
	texts := d.Steps[len(d.Steps)-1].Texts
	assert.Len(t, texts, maxTexts+1)
	assert.Equal(t, "and 80 more", texts[maxTexts])
}

func TestExplainStopsWhereRequestsLeave(t *testing.T) {
	steps := func(pod *corev1.Pod, objects ...any) string {
		h := newHarness(t, Config{}, append(objects, pod)...)
		h.update()
		d, err := h.Explain("shop", "p", Selector{}, nil)
		require.NoError(t, err)
		var names []string
		for _, step := range d.Steps {
			names = append(names, step.Name)
		}
		return strings.Join(names, " ")
	}
	pod := resolvertest.Pod("p", "10.0.0.1", "cart")
	assert.Equal(t, "requests address exception binding", steps(pod))
	assert.Equal(t, "requests address exception", steps(pod, resolvertest.Exception("e", pod.Labels)))
	assert.Equal(t, "requests", steps(resolvertest.With(resolvertest.Pod("p", "10.0.0.1", "cart"), func(p *corev1.Pod) { p.Spec.HostNetwork = true })))
}

// What a pod's namespace may read names no object of another one.
func TestHint(t *testing.T) {
	p := resolvertest.Pod("p", "10.0.0.1", "cart")
	h := newHarness(t, Config{}, resolvertest.In("bank", resolvertest.Binding("far", "cart", "cart")), p)
	h.update()
	pod, err := h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
	require.NoError(t, err)
	_, err = pod.Identity(Selector{})
	hint := h.Hint(err)
	assert.Equal(t, BindingInOtherNamespace, hint.Reason)
	assert.Contains(t, hint.NearMisses, "bank/far", "for the log")
	assert.NotContains(t, hint.Fix+err.Error(), "bank")
	assert.Empty(t, Claimants(err))

	h.put(resolvertest.Pod("q", "10.0.0.1", ""))
	h.update()
	_, err = h.Resolve(t.Context(), netip.MustParseAddr("10.0.0.1"))
	require.ErrorIs(t, err, ErrAmbiguousAddress)
	assert.ElementsMatch(t, []string{"shop/p", "shop/q"}, []string{Claimants(err)[0].String(), Claimants(err)[1].String()})
	assert.Contains(t, h.Hint(err).Fix, "delete all of these pods but one")
}
