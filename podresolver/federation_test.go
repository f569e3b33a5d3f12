package podresolver

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/podresolver/resolvertest"
)

const (
	fedClient = "fed00000-0000-4000-8000-000000000001"
	fedOther  = "fed00000-0000-4000-8000-000000000002"
	fedTenant = "7e9a9700-0000-4000-8000-00000000000a"
)

// annotated is a service account with a client ID, and further annotations as key, value, ….
func annotated(clientID string, more ...string) *metav1.PartialObjectMetadata {
	annotations := map[string]string{ClientIDAnnotation: clientID}
	for i := 0; i < len(more); i += 2 {
		annotations[more[i]] = more[i+1]
	}
	return resolvertest.ServiceAccount(resolvertest.ServiceAccountName, annotations)
}

// on is --federation=annotated.
func on(cfg Config) Config {
	cfg.Federation = Federation{ServiceAccounts: true, TenantID: fedTenant}
	return cfg
}

// cartAccount is the service account of the pods of these tests.
var cartAccount = ServiceAccount{Namespace: "shop", Name: resolvertest.ServiceAccountName, UID: "uid-of-" + resolvertest.ServiceAccountName}

func TestAnnotatedServiceAccount(t *testing.T) {
	account := annotated(" "+strings.ToUpper(fedClient)+"\n", AdditionalClientIDsAnnotation, " "+fedOther+", ,"+fedClient+","+fedOther)
	pod := resolvertest.Pod("p", addr.String(), "")
	h := newHarness(t, on(Config{}), account, pod)
	got, err := h.decide(pod).Identity(Selector{})
	require.NoError(t, err)
	assert.Equal(t, Identity{
		Namespace: "shop", Name: "cart", ClientID: fedClient,
		Principal: &Principal{TenantID: fedTenant, Authority: defaultAuthority, ServiceAccount: cartAccount, Annotated: true},
	}, got)
	assert.Equal(t, "ServiceAccount shop/cart (federated, client ID "+fedClient+", tenant "+fedTenant+")", got.String())
	more, err := h.decide(pod).Identity(Selector{ClientID: strings.ToUpper(fedOther)})
	require.NoError(t, err)
	assert.Equal(t, fedOther, more.ClientID)
	assert.Len(t, h.decide(pod).identities, 2)

	_, err = h.decide(pod).Identity(Selector{ClientID: cartClient})
	require.ErrorIs(t, err, ErrNoIdentity)

	off := newHarness(t, Config{Federation: Federation{TenantID: fedTenant}}, account, pod)
	_, err = off.decide(pod).Identity(Selector{})
	require.ErrorIs(t, err, ErrNoIdentity, "without the flag")
	assert.NotContains(t, off.explain(t), "ServiceAccount")

	strict := newHarness(t, on(Config{StrictSelection: true}), account, pod)
	_, err = strict.decide(pod).Identity(Selector{})
	require.ErrorIs(t, err, ErrMultipleIdentities)

	excepted := newHarness(t, on(Config{}), account, resolvertest.Exception("e", map[string]string{"aadpodidbinding": "x"}))
	assert.Equal(t, "e", excepted.decide(resolvertest.Pod("p", addr.String(), "x")).Exception(), "exceptions come first")
}

func TestTenantAndAuthority(t *testing.T) {
	cfg := Config{Federation: Federation{ServiceAccounts: true, TenantID: fedTenant, Authority: "https://login.microsoftonline.us"}}
	pod := resolvertest.Pod("p", addr.String(), "x")
	principal := func(objects ...any) *Principal {
		got, err := newHarness(t, cfg, objects...).decide(pod).Identity(Selector{})
		require.NoError(t, err)
		return got.Principal
	}
	want := Principal{TenantID: fedTenant, Authority: "https://login.microsoftonline.us", ServiceAccount: cartAccount, Annotated: true}
	assert.Equal(t, &want, principal(annotated(fedClient)))
	want.TenantID = "contoso.example"
	assert.Equal(t, &want, principal(annotated(fedClient, TenantIDAnnotation, " contoso.example ")))

	id := resolvertest.Federated(resolvertest.Identity("i", fedClient, ""))
	binding := resolvertest.Binding("b", "x", "i")
	want.TenantID, want.Annotated = fedTenant, false
	assert.Equal(t, &want, principal(id, binding, annotated(fedOther)))
	id.Spec.TenantID, id.Spec.ADEndpoint = " t ", " https://login.partner.microsoftonline.cn/\n"
	want.TenantID, want.Authority = "t", "https://login.partner.microsoftonline.cn"
	assert.Equal(t, &want, principal(id, binding, annotated(fedOther)))
}

// TestFederatedIdentity: tokens of a federated AzureIdentity never come from IMDS.
func TestFederatedIdentity(t *testing.T) {
	federated := func(change func(*aadpodidentity.AzureIdentity)) *aadpodidentity.AzureIdentity {
		id := resolvertest.Federated(resolvertest.Identity("i", fedClient, resolvertest.ResourceID("i")))
		id.Spec.TenantID = fedTenant
		change(id)
		return id
	}
	annotate := func(value string) func(*aadpodidentity.AzureIdentity) {
		return func(id *aadpodidentity.AzureIdentity) { id.Annotations[aadpodidentity.FederatedAnnotation] = value }
	}
	asEver := func(*aadpodidentity.AzureIdentity) {}
	for name, tc := range map[string]struct {
		change   func(*aadpodidentity.AzureIdentity)
		fromIMDS bool
		why      string // part of the error; "" for none
	}{
		"as it should be": {change: asEver},
		"in other words":  {change: annotate(" TRUE\n")},
		"not":             {change: annotate("false"), fromIMDS: true},
		"empty":           {change: annotate(""), fromIMDS: true},
		"odd":             {change: annotate("yes"), why: `has the annotation aadpodidentity.k8s.io/Federated="yes", which is neither "true" nor "false"`},
		"no client ID":    {change: func(id *aadpodidentity.AzureIdentity) { id.Spec.ClientID = "" }, why: "is federated and has no clientID"},
		"no tenant":       {change: func(id *aadpodidentity.AzureIdentity) { id.Spec.TenantID = "" }, why: "is federated and has no tenant ID: give it one, or all of them by --federation-tenant-id"},
		"odd tenant":      {change: func(id *aadpodidentity.AzureIdentity) { id.Spec.TenantID = "../common" }, why: `has tenant ID "../common", which is neither a GUID nor a domain`},
		"odd client ID":   {change: func(id *aadpodidentity.AzureIdentity) { id.Spec.ClientID = "{" + fedClient + "}" }, why: "which is not a GUID"},
		"odd resource ID": {change: func(id *aadpodidentity.AzureIdentity) { id.Spec.ResourceID = "odd" }, why: "which is not the resource ID"},
		"a type with a secret": {change: func(id *aadpodidentity.AzureIdentity) {
			id.Spec.Type, id.Spec.ClientPassword.Name = aadpodidentity.ServicePrincipal, "s"
		}, why: "which is for type 0"},
		"malformed": {change: func(id *aadpodidentity.AzureIdentity) { id.Spec = aadpodidentity.AzureIdentitySpec{Unreadable: "odd"} }, why: "is malformed: odd"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, mode := range []Mode{Managed, Standard} {
				id, b := federated(tc.change), resolvertest.Binding("b", "x", "i")
				pod := resolvertest.Pod("p", addr.String(), "x")
				h := newHarness(t, Config{Mode: mode}, id, b, pod)
				if mode == Standard {
					h.put(resolvertest.Assigned("a", "p", aadpodidentity.Assigned, id, b))
				}
				got, err := h.decide(pod).Identity(Selector{})
				if tc.why != "" {
					require.ErrorIs(t, err, ErrNoIdentity, mode)
					require.ErrorContains(t, err, tc.why, mode)
					assert.Contains(t, h.explain(t), tc.why, mode)
					continue
				}
				require.NoError(t, err, mode)
				if tc.fromIMDS {
					assert.Nil(t, got.Principal, mode)
					continue
				}
				require.NotNil(t, got.Principal, mode)
				assert.True(t, got.Principal.Federated(), mode)
				assert.Empty(t, got.Principal.ServiceAccount.UID, "unknown without --federation=annotated")
				assert.Contains(t, got.String(), "tenant "+fedTenant+", federated by ServiceAccount shop/cart", mode)
			}
		})
	}
	pod := resolvertest.Pod("p", addr.String(), "x")
	pod.Spec.ServiceAccountName = ""
	_, err := newHarness(t, Config{}, federated(asEver), resolvertest.Binding("b", "x", "i")).decide(pod).Identity(Selector{})
	assert.ErrorContains(t, err, "the pod has no service account")
}

// TestFederatedAfterAssignment: MIC's copy of an AzureIdentity is older than the annotation.
func TestFederatedAfterAssignment(t *testing.T) {
	b := resolvertest.Binding("b", "x", "i")
	before := resolvertest.Identity("i", fedClient, "")
	after := resolvertest.Federated(resolvertest.Identity("i", fedClient, ""))
	after.Spec.TenantID = fedTenant
	pod := resolvertest.Pod("p", addr.String(), "x")
	h := newHarness(t, Config{Mode: Standard}, before, b, pod, resolvertest.Assigned("a", "p", aadpodidentity.Assigned, before, b))
	h.update()
	got, err := h.Owner(addr).Identity(Selector{})
	require.NoError(t, err)
	require.Nil(t, got.Principal)
	h.put(after)
	h.update()
	got, err = h.Owner(addr).Identity(Selector{})
	require.NoError(t, err)
	require.NotNil(t, got.Principal)

	// The binding is gone, and MIC has not noticed yet.
	h.put(before)
	h.drop(b)
	h.update()
	h.put(after)
	h.update()
	got, err = h.Owner(addr).Identity(Selector{})
	require.NoError(t, err)
	require.NotNil(t, got.Principal)
}

// TestPrecedence: what is bound to a pod comes before what its service account gives it.
func TestPrecedence(t *testing.T) {
	bound, pod := []any{resolvertest.Identity("i", cartClient, ""), resolvertest.Binding("b", "x", "i")}, resolvertest.Pod("p", addr.String(), "x")
	account := annotated(fedClient)
	for name, tc := range map[string]struct {
		mode             Mode
		objects          []any
		byDefault, named string // client IDs
		err              error  // of the default; nil for none
		explained        string
	}{
		"nothing is bound": {objects: []any{account}, byDefault: fedClient, named: fedClient, explained: "ok account: ServiceAccount shop/cart gives it client ID " + fedClient + " of tenant " + fedTenant},
		"bound":            {objects: append(bound, account), byDefault: cartClient, named: fedClient, explained: "a binding matches the pod, so that a request that names no identity does not get the service account's"},
		"bound to nothing": {objects: []any{account, resolvertest.Binding("b", "x", "gone")}, named: fedClient, err: ErrNoIdentity, explained: "IdentityMissing: create AzureIdentity shop/gone"},
		"not assigned":     {mode: Standard, objects: append(bound, account), named: fedClient, err: ErrNotAssigned, explained: "NotAssigned: "},
		"bound, too":       {objects: []any{resolvertest.Identity("i", fedClient, ""), resolvertest.Binding("b", "x", "i"), account}, byDefault: fedClient, named: fedClient, explained: "which is bound to it, too: the binding decides where its tokens come from"},
		"an assignment of no weight": {
			mode: Standard, objects: []any{
				account,
				resolvertest.In("evil", resolvertest.Assigned("a", "p", aadpodidentity.Assigned, resolvertest.Identity("i", cartClient, ""), resolvertest.Binding("b", "x", "i"))),
			},
			byDefault: fedClient, named: fedClient, explained: "ok account",
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, on(Config{Mode: tc.mode}), append(tc.objects, pod)...)
			assert.Contains(t, h.explain(t), tc.explained)
			got, err := h.decide(pod).Identity(Selector{})
			require.ErrorIs(t, err, tc.err)
			assert.Equal(t, tc.byDefault, got.ClientID)
			got, err = h.decide(pod).Identity(Selector{ClientID: fedClient})
			require.NoError(t, err)
			assert.Equal(t, tc.named, got.ClientID)
			assert.Equal(t, name != "bound, too", got.Annotated())
		})
	}
}

func TestUnusableAnnotations(t *testing.T) {
	const denied = "dead0000-0000-4000-8000-000000000001"
	many := make([]string, 30)
	for i := range many {
		many[i] = resolvertest.GUID(fmt.Sprint(i))
	}
	for name, tc := range map[string]struct {
		account *metav1.PartialObjectMetadata
		cfg     func(*Config)
		why     string
		has     int // identities all the same
	}{
		"odd client ID":   {account: annotated("cart"), why: `ServiceAccount shop/cart has client ID "cart", which is not a GUID`},
		"denied":          {account: annotated(denied, AdditionalClientIDsAnnotation, fedOther), why: "ServiceAccount shop/cart has client ID " + denied + ", denied by --deny-identity"},
		"no tenant":       {account: annotated(fedClient), cfg: func(c *Config) { c.Federation.TenantID = "" }, why: "all of them by --federation-tenant-id"},
		"odd tenant":      {account: annotated(fedClient, TenantIDAnnotation, "a/b"), why: `ServiceAccount shop/cart has tenant ID "a/b", which is neither a GUID nor a domain`},
		"additional only": {account: annotated("", AdditionalClientIDsAnnotation, fedOther), why: "and not " + ClientIDAnnotation + ", which is required"},
		"odd additional":  {account: annotated(fedClient, AdditionalClientIDsAnnotation, "x,"+denied+","+fedOther), why: `has client ID "x", which is not a GUID`, has: 2},
		"odd ones":        {account: annotated(fedClient, AdditionalClientIDsAnnotation, "x,y,"+fedOther+",z"), why: ", and 2 more of that kind in " + AdditionalClientIDsAnnotation, has: 2},
		"too many":        {account: annotated(fedClient, AdditionalClientIDsAnnotation, strings.Join(many, ",")), why: "more than 20 client IDs", has: 21},
		"not annotated":   {account: annotated(""), why: "no annotation azure.workload.identity/client-id"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := on(Config{Deny: DenyList{ClientIDs: []string{denied}}})
			if tc.cfg != nil {
				tc.cfg(&cfg)
			}
			pod := resolvertest.Pod("p", addr.String(), "")
			h := newHarness(t, cfg, tc.account, pod)
			assert.Len(t, h.decide(pod).identities, tc.has)
			said := h.explain(t)
			assert.Contains(t, said, tc.why)
			_, err := h.decide(pod).Identity(Selector{})
			if tc.has > 0 {
				require.NoError(t, err)
				assert.Contains(t, said, "warning account: ", "of what it does not give")
				return
			}
			require.ErrorIs(t, err, ErrNoIdentity)
			if name == "not annotated" {
				assert.Contains(t, said, "or annotate ServiceAccount shop/cart with azure.workload.identity/client-id")
				return
			}
			assert.ErrorContains(t, err, tc.why)
			assert.Contains(t, said, "failed account: ")
			assert.Contains(t, said, "ServiceAccountUnusable: correct the annotations of ServiceAccount shop/cart")
			assert.Equal(t, ServiceAccountUnusable, h.Hint(err).Reason)
		})
	}
}

func TestFederatedIdentities(t *testing.T) {
	id := resolvertest.Federated(resolvertest.Identity("i", fedOther, ""))
	h := newHarness(t, on(Config{}), annotated(fedClient), id, resolvertest.Binding("b", "x", "i"),
		resolvertest.Identity("imds", cartClient, ""), resolvertest.Binding("c", "x", "imds"))
	assert.Empty(t, h.FederatedIdentities())
	h.put(resolvertest.With(resolvertest.Pod("host", "", "x"), func(p *corev1.Pod) { p.Spec.HostNetwork = true }))
	var clients []string
	for _, id := range h.FederatedIdentities() {
		clients = append(clients, id.ClientID)
	}
	assert.ElementsMatch(t, []string{fedClient, fedOther}, clients)
	h.drop(resolvertest.Pod("host", "", ""))
	assert.Empty(t, h.FederatedIdentities())
}

// TestStrictSelectionOfBound: the annotation of a service account changes nothing for a pod that has a
// binding.
func TestStrictSelectionOfBound(t *testing.T) {
	pod, account := resolvertest.Pod("p", addr.String(), "x"), annotated(fedClient, AdditionalClientIDsAnnotation, fedOther)
	one := []any{resolvertest.Identity("i", cartClient, ""), resolvertest.Binding("b", "x", "i"), account, pod}
	h := newHarness(t, on(Config{StrictSelection: true}), one...)
	got, err := h.decide(pod).Identity(Selector{})
	require.NoError(t, err)
	assert.Equal(t, cartClient, got.ClientID)
	for _, clientID := range []string{cartClient, fedClient, fedOther} {
		_, err = h.decide(pod).Identity(Selector{ClientID: clientID})
		require.NoError(t, err)
	}
	h.put(resolvertest.Identity("j", resolvertest.GUID("j"), ""), resolvertest.Binding("c", "x", "j"))
	_, err = h.decide(pod).Identity(Selector{})
	require.ErrorIs(t, err, ErrMultipleIdentities)
}
