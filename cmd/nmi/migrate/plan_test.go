package migrate

import (
	"bytes"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

const (
	clientID   = "ca470000-0000-4000-8000-000000000001"
	resourceID = "/subscriptions/s1/resourcegroups/rg/providers/microsoft.managedidentity/userassignedidentities/cart"
	issuer     = "https://eastus.oic.example/tenant/cluster/"
	remove     = `az vmss identity remove --resource-group "$NODE_GROUP" --name "$SCALE_SET" --identities ` + resourceID
)

func bound(change func(*podresolver.BoundIdentity)) podresolver.BoundIdentity {
	id := podresolver.BoundIdentity{Namespace: "shop", Name: "cart", ClientID: clientID, ResourceID: resourceID, Bindings: []string{"cart"}}
	if change != nil {
		change(&id)
	}
	return id
}

func federated(id *podresolver.BoundIdentity) { id.Federated = true }

// pods are pods with service accounts that get AzureIdentity shop/cart.
func pods(accounts ...string) (all []podresolver.InventoryPod) {
	for i, account := range accounts {
		all = append(all, podresolver.InventoryPod{
			Namespace: "shop", Name: fmt.Sprint("p", i), ServiceAccount: account, Identities: []podresolver.Identity{{Namespace: "shop", Name: "cart"}},
		})
	}
	return all
}

func onHost(all []podresolver.InventoryPod) []podresolver.InventoryPod {
	all[0].HostNetwork = true
	return all
}

func plans(o Options, pods []podresolver.InventoryPod, identities ...podresolver.BoundIdentity) *Plan {
	if o.Issuer == "" {
		o.Issuer = issuer
	}
	o.Audience, o.TenantID = "api://AzureADTokenExchange", "7e9a9700-0000-4000-8000-00000000000a"
	return New(podresolver.Inventory{Identities: identities, Pods: pods}, o)
}

func TestReady(t *testing.T) {
	p := plans(Options{}, pods("cart", "report.v2", "cart"), bound(nil))
	require.Len(t, p.Problems, 1)
	assert.Contains(t, p.Problems[0], "run the others only if each grep prints a line")
	id := p.Identities[0]
	assert.Equal(t, Ready, id.State)
	assert.Equal(t, []Account{{"shop", "cart", 2}, {"shop", "report.v2", 1}}, id.ServiceAccounts)
	assert.False(t, id.MayLeave)
	require.Len(t, id.Commands, 5)
	assert.Equal(t, "grep --ignore-case --fixed-strings --line-regexp "+resourceID+
		` <<< "$(az vmss identity show --resource-group "$NODE_GROUP" --name "$SCALE_SET" --query 'keys(userAssignedIdentities)' --output tsv)"`, id.Commands[0])
	assert.Equal(t, "grep --ignore-case --fixed-strings --line-regexp "+clientID+
		` <<< "$(az identity show --query clientId --output tsv --ids `+resourceID+`)"`, id.Commands[1], "one may be of another identity")
	name := credentialName(issuer, id.ServiceAccounts[0])
	assert.Equal(t, "az identity federated-credential create --subscription s1 --resource-group rg --identity-name cart --name "+name+
		" --issuer "+issuer+" --subject system:serviceaccount:shop:cart --audiences api://AzureADTokenExchange", id.Commands[2])
	assert.Regexp(t, "^shop-cart-[0-9a-f]{8}$", name)
	assert.Contains(t, id.Commands[3], "--name shop-report-v2-")
	assert.Equal(t, "kubectl --namespace=shop annotate azureidentity cart aadpodidentity.k8s.io/Federated=true", id.Commands[4])
}

func TestStates(t *testing.T) {
	many := make([]string, 21)
	for i := range many {
		many[i] = fmt.Sprint("a", i)
	}
	for name, tc := range map[string]struct {
		identity func(*podresolver.BoundIdentity)
		pods     []podresolver.InventoryPod
		options  Options
		state    State
		problem  string // of the identity
		last     string // command
		leaves   bool
	}{
		"moved":                   {identity: federated, pods: pods("cart"), state: Moved, last: remove, leaves: true},
		"moved, standard mode":    {identity: federated, pods: pods("cart"), options: Options{Mode: podresolver.Standard}, state: Moved},
		"moved, without pods":     {identity: federated, state: Moved, last: remove, leaves: true},
		"moved, on the host":      {identity: federated, pods: onHost(pods("cart")), state: Moved, problem: "pods on the host network ask IMDS themselves, and lose it when it leaves the node: shop/p0"},
		"unused":                  {state: Unused},
		"default service account": {pods: pods("cart", "default"), state: Blocked, problem: "have the service account default", last: "az identity federated-credential create"},
		"on the host":             {pods: onHost(pods("cart", "cart")), state: Blocked, problem: "shop/p0", last: "az identity federated-credential create"},
		"on the host alone":       {pods: onHost(pods("cart")), state: Blocked, problem: "shop/p0"},
		"too many":                {pods: pods(many...), state: Blocked, problem: "it needs 21 federated credentials, and can have 20: see --identity-bindings", last: "az identity federated-credential create"},
		"many, identity bindings": {pods: pods(many...), options: Options{IdentityBindings: true}, state: Ready, last: "kubectl --namespace=shop annotate"},
		"no client ID, bindings":  {identity: func(id *podresolver.BoundIdentity) { id.ClientID = "" }, pods: pods("cart"), options: Options{IdentityBindings: true}, state: Blocked, problem: "it has no clientID", last: "az identity show"},
		"no client ID":            {identity: func(id *podresolver.BoundIdentity) { id.ClientID = "" }, pods: pods("cart"), state: Blocked, problem: "it has no clientID", last: "az identity federated-credential create"},
		"unusable":                {identity: func(id *podresolver.BoundIdentity) { id.Unusable = "is malformed: odd" }, pods: pods("cart"), state: Blocked, problem: "it is malformed: odd"},
		"service principal":       {identity: func(id *podresolver.BoundIdentity) { id.Type = aadpodidentity.ServicePrincipal }, pods: pods("cart"), state: NotOnNode, problem: "a service principal"},
	} {
		t.Run(name, func(t *testing.T) {
			id := plans(tc.options, tc.pods, bound(tc.identity)).Identities[0]
			assert.Equal(t, tc.state, id.State)
			assert.Contains(t, strings.Join(id.Problems, "\n"), tc.problem)
			assert.Equal(t, tc.problem == "", len(id.Problems) == 0, id.Problems)
			assert.Equal(t, tc.leaves, id.MayLeave)
			if tc.last == "" {
				assert.Empty(t, id.Commands)
				return
			}
			require.NotEmpty(t, id.Commands)
			assert.True(t, strings.HasPrefix(id.Commands[len(id.Commands)-1], tc.last), id.Commands)
		})
	}
}

// TestMayLeave: another AzureIdentity may name the same identity.
func TestMayLeave(t *testing.T) {
	other := func(change func(*podresolver.BoundIdentity)) podresolver.BoundIdentity {
		id := bound(change)
		id.Name = "other"
		return id
	}
	for name, tc := range map[string]struct {
		other  podresolver.BoundIdentity
		leaves bool
	}{
		"by client ID":       {other(func(id *podresolver.BoundIdentity) { id.ResourceID = "" }), false},
		"by resource ID":     {other(func(id *podresolver.BoundIdentity) { id.ClientID = "" }), false},
		"moved, too":         {other(federated), true},
		"without a binding":  {other(func(id *podresolver.BoundIdentity) { id.Bindings = nil }), true},
		"another":            {other(func(id *podresolver.BoundIdentity) { id.ClientID, id.ResourceID = "x", "y" }), true},
		"both without an ID": {other(func(id *podresolver.BoundIdentity) { id.ClientID, id.ResourceID = "", "" }), true},
	} {
		assert.Equal(t, tc.leaves, plans(Options{}, nil, bound(federated), tc.other).Identities[0].MayLeave, name)
	}
}

func TestExceptedPodsAndIssuers(t *testing.T) {
	excepted := pods("cart")
	excepted[0].Exception = "addons"
	p := plans(Options{Issuer: "https://kubernetes.default.svc.cluster.local"}, excepted, bound(nil))
	assert.Equal(t, []string{"shop/p0 (exception addons)"}, p.Excepted)
	require.Len(t, p.Problems, 2)
	assert.Contains(t, p.Problems[0], "excepted pods get the identities of the node")
	assert.Contains(t, p.Problems[1], "az aks update --enable-oidc-issuer")
	for problem, o := range map[string]Options{
		"in standard mode MIC keeps identities on the scale set": {Mode: podresolver.Standard, TenantID: "t"},
		"a federated AzureIdentity has to have a tenantID":       {},
	} {
		o.Issuer = issuer
		problems := New(podresolver.Inventory{}, o).Problems
		require.Len(t, problems, 1)
		assert.Contains(t, problems[0], problem)
	}
	assert.Equal(t, Unused, p.Identities[0].State, "an excepted pod does not get it")
	assert.Contains(t, plans(Options{Issuer: "https://kubernetes.default.svc"}, pods("cart"), bound(nil)).Identities[0].Commands[2], `--issuer "$ISSUER"`)
}

// TestCommandsAreQuoted: authors of AzureIdentities do not write commands of administrators.
func TestCommandsAreQuoted(t *testing.T) {
	const evil = `$(touch x)'; rm -rf "é`
	id := bound(func(id *podresolver.BoundIdentity) {
		id.ResourceID = "/subscriptions/" + evil + "/resourcegroups/(a)/providers/microsoft.managedidentity/userassignedidentities/" + evil
	})
	for _, o := range []Options{{}, {IdentityBindings: true}} {
		for _, command := range plans(o, pods("cart"), id).Identities[0].Commands {
			// What a shell makes of it, with another program.
			command = strings.Replace(command, "<<< ", "", 1)
			out, err := exec.CommandContext(t.Context(), "sh", "-c", `az() { printf '%s\n' "$@"; }; printf '%s\n' `+command).Output()
			require.NoError(t, err, command)
			if !strings.HasPrefix(command, "kubectl ") {
				assert.True(t, slices.ContainsFunc(strings.Split(string(out), "\n"), func(word string) bool { return word == evil || word == id.ResourceID }), command)
			}
		}
	}
	assert.Equal(t, `''`, quote(""))
	byClientID := plans(Options{}, pods("cart"), bound(func(id *podresolver.BoundIdentity) { id.ResourceID = "" })).Identities[0].Commands
	assert.Contains(t, byClientID[0], `--line-regexp "$(az identity list --query "[?clientId=='`+clientID+`'].id" --output tsv)" `)
	assert.Contains(t, byClientID[1], `--identity-name "$(az identity list --query "[?clientId=='`+clientID+`'].name" --output tsv)"`)
}

func TestPrint(t *testing.T) {
	var out bytes.Buffer
	p := plans(Options{}, pods("cart", "default"), bound(nil), bound(func(id *podresolver.BoundIdentity) { id.Name, id.Federated = "moved", true }))
	for i := range 25 {
		p.Excepted = append(p.Excepted, fmt.Sprint("shop/e", i))
	}
	p.Print(terminal.New(&out))
	for _, line := range []string{
		"‼ AzureIdentity shop/cart: blocked", "  service accounts: shop/cart (pods: 1), shop/default (pods: 1)", "√ AzureIdentity shop/moved: moved",
		"moved: 1, ready: 0, blocked: 1, unused: 0, not on the node: 0", "  and 5 more",
		"moved: its annotation says so; whether Entra gives it tokens, nmi explain <namespace>/<pod> knows on the pod's node",
	} {
		assert.Contains(t, out.String(), line+"\n")
	}
	out.Reset()
	p = plans(Options{Issuer: "https://kubernetes.default.svc"}, pods("cart"), bound(nil))
	p.Print(terminal.New(&out))
	assert.Regexp(t, `(?s)variables of a shell.*    CLUSTER_GROUP=<.*    CLUSTER=<.*    ISSUER="\$\(az aks.*    NODE_GROUP="\$\(az aks.*    SCALE_SET=<.*AzureIdentity shop/cart: ready`, out.String())
	for _, command := range p.Identities[0].Commands {
		for _, used := range regexp.MustCompile(`"\$([A-Z_]+)"`).FindAllStringSubmatch(command, -1) {
			assert.Contains(t, out.String(), "    "+used[1]+"=", "each variable is explained")
		}
	}
	out.Reset()
	plans(Options{}, nil).Print(terminal.New(&out))
	assert.Contains(t, out.String(), "there are no AzureIdentities")
}

// TestIdentityBindingNames: no AzureIdentity's role replaces another one's, and no identity's binding.
func TestIdentityBindingNames(t *testing.T) {
	commands := func(namespace, name, clientID, resourceID string) []string {
		id := bound(func(id *podresolver.BoundIdentity) {
			id.Namespace, id.Name, id.ClientID, id.ResourceID = namespace, name, clientID, resourceID
		})
		all := pods("cart")
		all[0].Identities[0] = podresolver.Identity{Namespace: namespace, Name: name}
		return plans(Options{IdentityBindings: true}, all, id).Identities[0].Commands[2:]
	}
	one := commands("shop", "cart-x", clientID, resourceID)
	assert.Contains(t, one[0], "--name "+clientID+" --managed-identity-resource-id "+resourceID)
	assert.Contains(t, one[1], `"ClusterRole","metadata":{"name":"use:shop:cart-x"}`)
	const other = "ca470000-0000-4000-8000-000000000002"
	two := commands("shop-cart", "x", other, strings.Replace(resourceID, "/rg/", "/rg2/", 1))
	assert.Contains(t, two[0], "--name "+other+" ")
	assert.Contains(t, two[1], `"ClusterRole","metadata":{"name":"use:shop-cart:x"}`)
}

// TestCredentialsOfOneIdentity: the limit is that of the identity, which several AzureIdentities may name.
func TestCredentialsOfOneIdentity(t *testing.T) {
	var all []podresolver.InventoryPod
	give := func(name, account string) {
		all = append(all, podresolver.InventoryPod{Namespace: "shop", Name: fmt.Sprint("p", len(all)), ServiceAccount: account, Identities: []podresolver.Identity{{Namespace: "shop", Name: name}}})
	}
	for i := range maxCredentials {
		give("cart", fmt.Sprint("a", i))
	}
	give("other", "a0")
	cart, other := bound(nil), bound(func(id *podresolver.BoundIdentity) { id.Name = "other" })
	for _, id := range plans(Options{}, all, cart, other).Identities {
		assert.Equal(t, Ready, id.State, "they share a0")
	}
	give("other", "default")
	assert.Equal(t, Ready, plans(Options{}, all, cart, other).Identities[0].State, "for which no credential is to be")
	federated(&other)
	id := plans(Options{}, all, cart, other).Identities[0]
	assert.Equal(t, Blocked, id.State, "which has one all the same")
	assert.Equal(t, []string{"it needs 21 federated credentials (other AzureIdentities name it, too), and can have 20: see --identity-bindings"}, id.Problems)
	other.ClientID, other.ResourceID = "x", "y"
	assert.Equal(t, Ready, plans(Options{}, all, cart, other).Identities[0].State)
}
