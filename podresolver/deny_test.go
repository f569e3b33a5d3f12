package podresolver

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/cache"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

// IDs of the denied identity, and of another.
const (
	kubeletClient   = "0be1e700-0000-4000-8000-00000000000a"
	kubeletResource = "/subscriptions/S/resourceGroups/MC_g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/agentpool"
	cartClient      = "ca470000-0000-4000-8000-00000000000b"
	cartResource    = "/subscriptions/S/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/cart"
)

func denyList(t *testing.T, ids ...string) DenyList {
	t.Helper()
	d, err := ParseDenyList(ids)
	require.NoError(t, err)
	return d
}

func TestParseDenyList(t *testing.T) {
	d := denyList(t, " "+strings.ToUpper(kubeletClient)+" ", kubeletResource, strings.ToLower(cartResource))
	assert.Equal(t, DenyList{
		ClientIDs: []string{kubeletClient}, ResourceIDs: []string{strings.ToLower(kubeletResource), strings.ToLower(cartResource)},
	}, d)
	assert.Zero(t, denyList(t))
	for _, odd := range []string{
		"", " ", "agentpool", "0be1e70000004000800000000000000a", "{" + kubeletClient + "}", kubeletClient + "0", "0be1e700-0000-4000-8000-00000000000g",
		"/subscriptions/", "/subscriptionsx/s", "subscriptions/s/x", "/resourceGroups/g", "https://x/subscriptions/s", kubeletResource + "/",
		"/subscriptions//s", "/subscriptions/../s", "/subscriptions/s/%61", `/subscriptions/s\x`, "/subscriptions/s x", "/subscriptions/s?x", "/subscriptions/s;x",
	} {
		_, err := ParseDenyList([]string{kubeletClient, odd})
		require.ErrorContains(t, err, "is neither a client ID nor a resource ID: use a GUID", odd)
	}
}

func TestDenyList(t *testing.T) {
	braces := "{" + kubeletClient + "}"
	for name, tc := range map[string]struct {
		deny               string // IDs
		clientID, resource string // the AzureIdentity's
		why                string // "" if it is allowed
	}{
		"nothing denied, odd spellings":        {"", braces, "", "is not a GUID"},
		"client ID":                            {kubeletClient, kubeletClient, "", "has client ID " + kubeletClient + ", denied by --deny-identity"},
		"client ID in another case":            {kubeletClient, strings.ToUpper(kubeletClient), "", "denied by --deny-identity"},
		"client ID beside another resource ID": {kubeletClient, kubeletClient, cartResource, "denied by --deny-identity"},
		"resource ID":                          {kubeletResource, "", kubeletResource, "has resource ID " + strings.ToLower(kubeletResource) + ", denied by --deny-identity"},
		"resource ID in another case":          {kubeletResource, "", strings.ToUpper(kubeletResource), "denied by --deny-identity"},
		"resource ID beside another client ID": {kubeletResource, cartClient, kubeletResource, "denied by --deny-identity"},
		"the second of the list":               {cartClient + " " + kubeletClient, kubeletClient, "", "denied by --deny-identity"},
		"another identity":                     {kubeletClient + " " + kubeletResource, cartClient, cartResource, ""},
		"its other ID alone, the client ID":    {kubeletResource, kubeletClient, "", ""}, // as documented
		"its other ID alone, the resource ID":  {kubeletClient, "", kubeletResource, ""}, // see TestCheckToken
		"a GUID in braces":                     {kubeletClient, braces, "", "is not a GUID"},
		"a GUID without hyphens":               {kubeletClient, strings.ReplaceAll(kubeletClient, "-", ""), "", "is not a GUID"},
		"a GUID with a space":                  {kubeletClient, kubeletClient + " ", "", "denied by --deny-identity"},
		"a resource ID with two slashes":       {kubeletResource, "", strings.Replace(kubeletResource, "/resource", "//resource", 1), "is not the resource ID of a user-assigned identity"},
		"with a slash at its end":              {kubeletResource, "", kubeletResource + "/", "is not the resource ID of a user-assigned identity"},
		"with a dot segment":                   {kubeletResource, "", strings.Replace(kubeletResource, "/resource", "/./resource", 1), "is not the resource ID of a user-assigned identity"},
		"with a percent-encoding":              {kubeletResource, "", strings.Replace(kubeletResource, "agentpool", "%61gentpool", 1), "is not the resource ID of a user-assigned identity"},
		"with a line break":                    {kubeletResource, "", kubeletResource + "\n", "denied by --deny-identity"},
	} {
		t.Run(name, func(t *testing.T) {
			deny := denyList(t, strings.Fields(tc.deny)...)
			managed := resolvertest.Identity("kubelet", tc.clientID, tc.resource)
			b := resolvertest.Binding("b", "x", "kubelet")
			for h, prefix := range map[*harness]string{
				newHarness(t, Config{Deny: deny}, managed, b):                                                                                `AzureIdentityBinding "b" names AzureIdentity "kubelet", which `,
				newHarness(t, Config{Deny: deny, Mode: Standard}, resolvertest.Assigned("a", "p", "Assigned", managed, b)):                   `AzureAssignedIdentity default/a names AzureIdentity shop/kubelet, which `,
				newHarness(t, Config{Deny: deny, Mode: Standard}, resolvertest.Assigned("a", "p", "Created", managed, b)):                    `AzureAssignedIdentity default/a names AzureIdentity shop/kubelet, which `,
				newHarness(t, Config{Deny: deny, Mode: Standard, IdentityWait: time.Nanosecond}, managed, b):                                 `AzureIdentityBinding "b" names AzureIdentity "kubelet", which `,
				newHarness(t, Config{Deny: deny, Mode: Standard}, resolvertest.In("kube-system", resolvertest.Pod("x", "", "")), managed, b): `AzureIdentityBinding "b" names AzureIdentity "kubelet", which `,
			} {
				p := resolvertest.Pod("p", "", "x")
				_, err := h.decide(p).Identity(Selector{})
				if tc.why == "" {
					assert.NotErrorIs(t, err, ErrNoIdentity)
					continue
				}
				require.ErrorIs(t, err, ErrNoIdentity)
				assert.ErrorContains(t, err, prefix)
				assert.ErrorContains(t, err, tc.why)
				h.put(p)
				_, _, err = h.decideNamed(cache.MetaObjectToName(p), Selector{}, time.Now())
				assert.ErrorIs(t, err, ErrNoIdentity, "by name")
			}
		})
	}
}

func TestDeniedServicePrincipal(t *testing.T) {
	sp := resolvertest.Identity("sp", kubeletClient, "")
	sp.Spec.Type, sp.Spec.TenantID, sp.Spec.ClientPassword.Name = aadpodidentity.ServicePrincipal, "t", "s"
	h := newHarness(t, Config{Deny: denyList(t, kubeletClient)}, sp, resolvertest.Binding("b", "x", "sp"))
	_, err := h.decide(resolvertest.Pod("p", "", "x")).Identity(Selector{})
	require.ErrorContains(t, err, "denied by --deny-identity")
}

// A pod keeps its other identities, and one of them is its default.
func TestDeniedIdentityAmongOthers(t *testing.T) {
	kubelet, cart := resolvertest.Identity("kubelet", kubeletClient, ""), resolvertest.Identity("cart", cartClient, "")
	b, c := resolvertest.BindingOfAge("b", "x", "kubelet", time.Hour), resolvertest.Binding("c", "x", "cart")
	for _, h := range []*harness{
		newHarness(t, Config{Deny: denyList(t, kubeletClient), StrictSelection: true}, kubelet, cart, b, c),
		newHarness(t, Config{Deny: denyList(t, kubeletClient), Mode: Standard}, resolvertest.Assigned("a", "p", "", kubelet, b), resolvertest.Assigned("b", "p", "", cart, c)),
	} {
		p := h.decide(resolvertest.Pod("p", "", "x"))
		got, err := p.Identity(Selector{})
		require.NoError(t, err)
		assert.Equal(t, "cart", got.Name)
		_, err = p.Identity(Selector{ClientID: kubeletClient})
		require.ErrorIs(t, err, ErrNoIdentity)
		assert.ErrorContains(t, err, `none of those bound to it has the requested client ID "`+kubeletClient+`": AzureIdentity shop/cart (user-assigned managed identity, client ID `+cartClient+"); Azure")
		assert.ErrorContains(t, err, "has client ID "+kubeletClient+", denied by --deny-identity")
	}
}

func TestReasonOfADeniedToken(t *testing.T) {
	h := newHarness(t, Config{Deny: denyList(t, kubeletClient)})
	for _, id := range []string{kubeletClient, "not a GUID"} {
		hint := h.Hint(h.CheckToken(id))
		assert.Equal(t, IdentityUnusable, hint.Reason)
		assert.Contains(t, hint.Fix, "--deny-identity")
	}
}

func TestCheckToken(t *testing.T) {
	denying := newHarness(t, Config{Deny: denyList(t, kubeletClient, kubeletResource)})
	for clientID, want := range map[string]string{
		cartClient:                     "",
		kubeletClient:                  "the token is for client ID " + kubeletClient + ", denied by --deny-identity",
		strings.ToUpper(kubeletClient): "denied by --deny-identity",
		"{" + kubeletClient + "}":      "is not a GUID and cannot be compared",
		"":                             "is not a GUID",
	} {
		err := denying.CheckToken(clientID)
		if want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, ErrNoIdentity, clientID)
		assert.ErrorContains(t, err, want)
	}
	require.NoError(t, newHarness(t, Config{}).CheckToken("anything"))
	assert.Zero(t, testing.AllocsPerRun(100, func() { _ = denying.CheckToken(cartClient) }))
}

func TestExplainLimits(t *testing.T) {
	explain := func(cfg Config, objects ...any) string {
		return newHarness(t, cfg, append(objects, resolvertest.Pod("p", "10.0.0.1", "x"))...).explain(t)
	}
	deny := denyList(t, kubeletClient)
	kubelet, b := resolvertest.Identity("kubelet", kubeletClient, ""), resolvertest.Binding("b", "x", "kubelet")

	const served = `ok requests: it is on the pod network, where requests to IMDS are redirected to the agent
ok address: 10.0.0.1 is its own
`
	assert.Equal(t, served+`ok exception: none applies
failed binding: AzureIdentityBinding "b" names AzureIdentity "kubelet", which has client ID `+kubeletClient+`, denied by --deny-identity
IdentityUnusable: correct AzureIdentity shop/kubelet, or bind another one
`, explain(Config{Deny: deny}, kubelet, b))

	assert.Contains(t, explain(Config{Mode: Standard, Deny: deny}, resolvertest.Assigned("a", "p", "Assigned", kubelet, b)),
		`failed assignment: AzureAssignedIdentity default/a names AzureIdentity shop/kubelet, which has client ID `+kubeletClient+", denied by --deny-identity\n")

	byResource := resolvertest.Identity("kubelet", "", kubeletResource)
	for _, text := range []string{
		explain(Config{Deny: deny}, byResource, b),
		explain(Config{Mode: Standard, Deny: deny}, byResource, b, resolvertest.Assigned("a", "p", "Assigned", byResource, b)),
	} {
		assert.Equal(t, 1, strings.Count(text, `: AzureIdentity "kubelet" has no client ID; if its tokens are for a client ID in --deny-identity, requests for them are refused`), text)
	}
	assert.NotContains(t, explain(Config{}, byResource, b), "deny-identity")

	excepting := resolvertest.Exception("e", map[string]string{aadpodidentity.BindingLabel: "x"})
	assert.Equal(t, served+`warning exception: AzurePodIdentityException "e" is ignored: namespace "shop" is not in --exception-namespaces
failed binding: no AzureIdentityBinding in namespace "shop" has the selector "x"
NoIdentityBound: create an AzureIdentityBinding with the selector "x" in namespace "shop", or correct the pod's label
`, explain(Config{ExceptionNamespaces: []string{"kube-system"}}, excepting))
	assert.Contains(t, explain(Config{ExceptionNamespaces: []string{"shop"}}, excepting), `is excepted by "e"`)
}
