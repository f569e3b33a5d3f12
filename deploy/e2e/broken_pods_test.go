//go:build e2e

package e2e

import (
	"net/http"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podidentity/nmi/deploy/testbed"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
	"github.com/podidentity/nmi/proxy/entratest"
	"github.com/podidentity/nmi/proxy/imdstest"
)

// podFaults are those for which one pod is refused, or those that ask for a new token.
var podFaults = []fault{
	{
		what: "no AzureIdentityBinding has the pod's label as its selector", reason: "NoIdentityBound", fix: "create an AzureIdentityBinding",
		faces: refusal("NoIdentityBound"),
		breaks: func(b *breakage) {
			b.newPod("unbound", "10.244.0.121", "unbound")
			b.mend = func() {
				b.binding("shop", "unbound", "cart", "unbound")
				b.says(b.serving, `msg="decision changed" pod=shop/unbound gets=shop/cart before=nothing`)
			}
		},
	},
	{
		what: "the pod's label and the selector differ in case", reason: "SelectorCaseDiffers", fix: `(in its controller's template) to`,
		faces: refusal("SelectorCaseDiffers"),
		breaks: func(b *breakage) {
			b.newPod("shouting", "10.244.0.122", "CART")
			b.mend = func() {
				_, err := world.Kube.CoreV1().Pods("shop").Patch(b.t.Context(), b.name, "application/merge-patch+json",
					[]byte(`{"metadata":{"labels":{"aadpodidbinding":"cart"}}}`), metav1.PatchOptions{})
				require.NoError(b.t, err)
			}
		},
	},
	{
		what: "the binding is in another namespace than the pod", reason: "BindingInOtherNamespace", fix: "create the AzureIdentityBinding, and its AzureIdentity, in namespace",
		faces: refusal("BindingInOtherNamespace"),
		breaks: func(b *breakage) {
			b.binding("kube-system", "elsewhere", "elsewhere", "elsewhere")
			b.newPod("astray", "10.244.0.123", "elsewhere")
			b.mend = func() { b.binding("shop", "elsewhere", "cart", "elsewhere") }
		},
	},
	{
		what: "the binding names an AzureIdentity that does not exist", reason: "IdentityMissing", fix: "create AzureIdentity shop/nowhere",
		faces: refusal("IdentityMissing"),
		breaks: func(b *breakage) {
			b.binding("shop", "dangling", "nowhere", "dangling")
			b.newPod("dangling", "10.244.0.124", "dangling")
			b.mend = func() { b.identity("shop", "nowhere", cart) }
		},
	},
	{
		what: "the AzureIdentity has a malformed client ID", reason: "IdentityUnusable", fix: "correct AzureIdentity shop/malformed",
		faces: refusal("IdentityUnusable"),
		breaks: func(b *breakage) {
			b.identity("shop", "malformed", imdstest.Identity{ClientID: "cart"})
			b.binding("shop", "malformed", "malformed", "malformed")
			b.newPod("malformed", "10.244.0.125", "malformed")
			b.mend = func() { b.identity("shop", "malformed", cart) }
		},
	},
	{
		what: "the application requests an identity that the pod does not have", reason: "RequestedIdentityMissing", fix: "request an identity that the pod has",
		faces: refusal("RequestedIdentityMissing"),
		breaks: func(b *breakage) {
			b.newPod("asking", "10.244.0.126", "asking")
			b.binding("shop", "asking", "cart", "asking")
			b.asks = b.asksAnew(b.pod, "&client_id="+third.ClientID)
			b.args = []string{"--client-id=" + third.ClientID}
			b.mend = func() {
				b.identity("shop", "third", third)
				b.binding("shop", "asking-third", "third", "asking")
			}
		},
	},
	{
		what: "the identity is not assigned to the node's scale set", reason: "IdentityUnknownToIMDS", fix: "assign the identity to the node's scale set or virtual machine",
		faces: refusal("IdentityUnknownToIMDS"),
		breaks: func(b *breakage) {
			b.identity("shop", "foreign", imdstest.Identity{ClientID: "f02e1900-0000-4000-8000-000000000001"})
			b.binding("shop", "foreign", "foreign", "foreign")
			b.newPod("foreign", "10.244.0.127", "foreign")
			b.mend = func() { b.identity("shop", "foreign", cart) }
		},
	},
	{
		what: "two pods have one address", reason: "AddressAmbiguous", fix: "delete all of these pods but one",
		faces: refusal("AddressAmbiguous"),
		breaks: func(b *breakage) {
			b.newPod("twin-a", "10.244.0.128", "cart")
			b.object("shop", "twin-b", "10.244.0.128", map[string]string{"aadpodidbinding": "cart"})
			b.mend = func() { require.NoError(b.t, world.DeletePod(b.t.Context(), "shop", "twin-b")) }
		},
	},
	{
		what: "pods share a bridge on which they can take each other's addresses", reason: "TokensWithheldOnBridge", fix: "use a network plugin that gives each pod a link of its own",
		faces: refusal("TokensWithheldOnBridge").saying(func(f *faces) {
			f.metric = "`nmi_sources_withheld` is 1"
			f.doctor = "`arp-spoofing` × `pods on cbr0 can take each other's addresses`, `use a network plugin`"
		}),
		breaks: func(b *breakage) {
			p, err := world.AddPod("10.244.0.129", testbed.Bridge)
			require.NoError(b.t, err)
			b.object("shop", "bridged", "10.244.0.129", map[string]string{"aadpodidbinding": "cart"})
			b.name, b.asks = "bridged", b.asksAnew(&pod{Pod: p, t: b.t}, "")
			b.mend = func() {
				assert.NoError(b.t, p.Close())
				require.NoError(b.t, world.DeletePod(b.t.Context(), "shop", "bridged"))
				b.newPod("unbridged", "10.244.0.130", "cart")
			}
		},
	},
	{
		what: "the client secret of a service principal is wrong", reason: "EntraRefused", fix: "correct what Entra names: the application, its credential",
		faces: refusal("EntraRefused"),
		breaks: func(b *breakage) {
			b.principal("wrong", secondSecret)
			b.newPod("principal-a", "10.244.0.131", "wrong")
			b.mend = func() { b.writeSecret("wrong", firstSecret) }
		},
	},
	{
		what: "the secret of a service principal does not exist, or may not be read", reason: "CredentialUnusable", fix: "correct the secret that the AzureIdentity names, or the agent's right to read it",
		faces: refusal("CredentialUnusable"),
		breaks: func(b *breakage) {
			b.principal("missing", "")
			b.newPod("principal-b", "10.244.0.132", "missing")
			b.mend = func() { b.writeSecret("missing", firstSecret) }
		},
	},
	{
		what: "the agent may not request tokens of the service account of a federated identity", reason: "CredentialUnusable", fix: "docs/federation.md#the-right-to-request-tokens",
		faces: refusal("CredentialUnusable"),
		breaks: func(b *breakage) {
			f := b.federated("unrequested", "10.244.0.135")
			b.mend = func() { f.grant("namespace.yaml") }
		},
	},
	{
		what: "a federated identity has no federated credential for the pod's service account", reason: "FederationUnknown", fix: "create a federated credential",
		faces: refusal("FederationUnknown"),
		breaks: func(b *breakage) {
			b.fakeEntra.SetFederated(federatedID)
			f := b.federated("untrusted", "10.244.0.136")
			f.grant("namespace.yaml")
			b.mend = func() {
				b.fakeEntra.SetFederated(federatedID, entratest.FederatedCredential{Issuer: testbed.Issuer, Subject: entratest.Subject("shop", "untrusted"), Audience: tokenAudience})
			}
		},
	},
	{
		what: "IMDS throttles the node", reason: "Throttled", fix: "find the pod or program that requests too many tokens",
		faces: refusal("Throttled").passes("it passes by itself, and is not one pod's fault"),
		breaks: func(b *breakage) {
			b.newPod("hasty", "10.244.0.133", "cart")
			world.IMDS.Inject(imdstest.Fault{Status: http.StatusTooManyRequests, RetryAfter: "3"})
		},
	},
	{
		what: "the node does not reach IMDS", reason: "IMDSUnavailable", fix: "see whether the node reaches 169.254.169.254",
		faces: refusal("IMDSUnavailable").passes("it is the node's or Azure's trouble, and is the same for all of its pods").saying(func(f *faces) {
			f.doctor = "`imds` × `no route to host`"
		}),
		breaks: func(b *breakage) {
			b.newPod("waiting", "10.244.0.134", "cart")
			b.mend = b.unreachable("169.254.169.254")
		},
	},
}

// newPod makes the affected pod, with its network.
func (b *breakage) newPod(name, addr, binding string) {
	b.t.Helper()
	b.pod = b.scenario.pod(name, addr, testbed.Ptp, binding)
	b.name, b.asks = name, b.asksAnew(b.pod, "")
}

// federated makes a federated AzureIdentity, its binding, a service account and the affected pod, of one
// name.
func (b *breakage) federated(name, addr string) *federation {
	b.t.Helper()
	f := &federation{scenario: b.scenario}
	f.serviceAccount(name, nil)
	b.put("AzureIdentity", "shop", name, map[string]any{
		"annotations": map[string]any{aadpodidentity.FederatedAnnotation: "true"},
		"spec":        map[string]any{"type": int64(0), "clientID": federatedID, "tenantID": principalTenant, "adEndpoint": b.authority},
	})
	b.binding("shop", name, name, name)
	b.pod = b.network(addr, testbed.Ptp)
	f.podOf("shop", name, name, testbed.NodeName, addr, name)
	b.name, b.asks = name, b.asksAnew(b.pod, "")
	return f
}

// principal makes an AzureIdentity of a service principal and its binding, of one name, that of its
// secret, too; without a value there is no secret.
func (b *breakage) principal(name, secret string) {
	b.t.Helper()
	b.principalIdentity(name, b.authority, map[string]any{"name": name})
	b.allow(name)
	if secret != "" {
		b.writeSecret(name, secret)
	}
}

// unreachable makes the kernel refuse what the node sends to an address, until mend is called.
func (b *breakage) unreachable(address string) (mend func()) {
	b.t.Helper()
	b.command("ip", "route", "add", "unreachable", address)
	return func() { b.command("ip", "route", "delete", "unreachable", address) }
}
