// Package migrate plans the way from identities on the nodes to federation: what each AzureIdentity
// needs before its tokens can come without the node, and what breaks when it leaves the node.
//
// The life of a plan: podresolver takes an inventory of the cluster; New turns it into steps for
// each AzureIdentity, as commands to read and run, without asking Azure anything; Print or JSON
// shows them.
package migrate

import (
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/podresolver"
	"github.com/podidentity/nmi/podresolver/aadpodidentity"
)

// maxCredentials is how many federated credentials an identity can have (learn.microsoft.com,
// "Workload identity federation", Important considerations and restrictions).
const maxCredentials = 20

// Options are what the inventory does not say.
type Options struct {
	Mode     podresolver.Mode // of the agents
	TenantID string           // --federation-tenant-id of the agents; "" for none
	Issuer   string           // of the cluster's service account tokens; "" if it is not known
	Audience string
	// IdentityBindings plans for AKS identity bindings in place of federated credentials.
	IdentityBindings bool
}

// State is how far an AzureIdentity has come.
type State string

// The states.
const (
	Moved     State = "moved"     // its tokens come by federation
	Ready     State = "ready"     // the commands are all that it takes
	Blocked   State = "blocked"   // something has to change first, see Problems
	Unused    State = "unused"    // no pod gets it now
	NotOnNode State = "notOnNode" // a service principal, which no node has
)

// Plan is the whole cluster's.
type Plan struct {
	Identities []Identity `json:"identities"`
	// Excepted are pods that get the node's identities, whichever it has.
	Excepted []string `json:"excepted,omitempty"`
	// Problems are those of the cluster.
	Problems []string `json:"problems,omitempty"`
}

// Identity is the plan for an AzureIdentity.
type Identity struct {
	Namespace  string `json:"namespace"`
	Name       string `json:"name"`
	ClientID   string `json:"clientID,omitempty"`
	ResourceID string `json:"resourceID,omitempty"`
	State      State  `json:"state"`

	Bindings        []string  `json:"bindings,omitempty"`
	ServiceAccounts []Account `json:"serviceAccounts,omitempty"` // of the pods that get it
	// Commands are in their order. What only Azure knows is a variable of the shell: NODE_GROUP,
	// SCALE_SET, CLUSTER_GROUP, CLUSTER, ISSUER.
	Commands []string `json:"commands,omitempty"`
	Problems []string `json:"problems,omitempty"`
	// MayLeave means that no AzureIdentity needs it on the nodes any more: Commands end with its
	// removal. Excepted pods may use it all the same. In standard mode none may leave.
	MayLeave bool `json:"mayLeave"`
}

// Account is a service account, and how many pods with it get the identity.
type Account struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Pods      int    `json:"pods"`
}

// shared reports whether pods have it for want of one of their own.
func (a Account) shared() bool { return a.Name == "default" || a.Name == "" }

// New makes a plan. Problems of the cluster do not change the state of an AzureIdentity.
func New(inventory podresolver.Inventory, o Options) *Plan {
	p := &Plan{Identities: []Identity{}}
	for _, pod := range inventory.Pods {
		if pod.Exception != "" {
			p.Excepted = append(p.Excepted, fmt.Sprintf("%s/%s (exception %s)", pod.Namespace, pod.Name, pod.Exception))
		}
	}
	if len(p.Excepted) > 0 {
		p.Problems = append(p.Problems, "excepted pods get the identities of the node, and lose those that leave it: give them another way first")
	}
	if why := issuerProblem(o.Issuer); why != "" && !o.IdentityBindings {
		p.Problems = append(p.Problems, why)
	}
	if o.Mode == podresolver.Standard {
		p.Problems = append(p.Problems, "in standard mode MIC keeps identities on the scale set, federated or not: none may leave it before the cluster is in managed mode")
	}
	if o.TenantID == "" {
		p.Problems = append(p.Problems, "without --federation-tenant-id (that of the agents) a federated AzureIdentity has to have a tenantID")
	}
	for _, in := range inventory.Identities {
		id := Identity{Namespace: in.Namespace, Name: in.Name, ClientID: in.ClientID, ResourceID: in.ResourceID, Bindings: in.Bindings}
		id.addPods(inventory.Pods)
		p.Identities = append(p.Identities, id)
	}
	grants := false
	for i, in := range inventory.Identities {
		id := &p.Identities[i]
		id.plan(in, inventory, p.credentials(in, inventory), o)
		grants = grants || id.State != Moved && len(id.Commands) > 0
	}
	if grants {
		p.Problems = append(p.Problems, "authors of AzureIdentities choose what these commands grant to their service accounts, "+
			"be it an identity that no node has: run the others only if each grep prints a line, or the identity is yours")
	}
	return p
}

// issuerProblem is why Entra cannot check the cluster's tokens, "" if it can.
func issuerProblem(issuer string) string {
	host, _, _ := strings.Cut(strings.TrimPrefix(issuer, "https://"), "/")
	if strings.HasPrefix(issuer, "https://") && strings.Contains(host, ".") && !strings.HasSuffix(host, ".svc") && !strings.HasSuffix(host, ".local") {
		return ""
	}
	return fmt.Sprintf("Entra cannot reach the cluster's issuer %q: az aks update --enable-oidc-issuer, or give --issuer", issuer)
}

// credentials is how many federated credentials an identity needs, which several AzureIdentities may
// name.
func (p *Plan) credentials(in podresolver.BoundIdentity, inventory podresolver.Inventory) int {
	accounts := make(map[Account]bool)
	for i, other := range inventory.Identities {
		if !sameOnNode(in, other) {
			continue
		}
		for _, a := range p.Identities[i].ServiceAccounts {
			if other.Federated || !a.shared() {
				accounts[Account{Namespace: a.Namespace, Name: a.Name}] = true
			}
		}
	}
	return len(accounts)
}

// plan is the rest of the plan, after addPods.
func (id *Identity) plan(in podresolver.BoundIdentity, inventory podresolver.Inventory, credentials int, o Options) {
	switch {
	case in.Type == aadpodidentity.ServicePrincipal || in.Type == aadpodidentity.ServicePrincipalCertificate:
		id.State = NotOnNode
		id.Problems = append(id.Problems, "a service principal has no identity on the node, and stays as it is; with a federated credential it needs no secret: type 0, with its clientID and tenantID")
		return
	case in.Unusable != "":
		id.State = Blocked
		id.Problems = append(id.Problems, "it "+in.Unusable)
		return
	case in.ClientID == "":
		id.Problems = append(id.Problems, "it has no clientID, by which Entra knows it")
		id.Commands = append(id.Commands, "az identity show --query clientId --output tsv --ids "+quote(in.ResourceID))
	}
	if in.Federated {
		id.State = Moved
	} else {
		id.addCredentials(credentials, o)
	}
	id.MayLeave = o.Mode != podresolver.Standard && mayLeave(in, inventory)
	if id.MayLeave {
		id.Commands = append(id.Commands, fmt.Sprintf(`az vmss identity remove --resource-group "$NODE_GROUP" --name "$SCALE_SET" --identities %s`, quote(in.ResourceID)))
	}
}

// addPods notes whose pods get the identity.
func (id *Identity) addPods(pods []podresolver.InventoryPod) {
	var onHost []string
	for _, pod := range pods {
		if pod.Exception != "" || !slices.ContainsFunc(pod.Identities, func(has podresolver.Identity) bool { return has.Namespace == id.Namespace && has.Name == id.Name }) {
			continue
		}
		if pod.HostNetwork {
			onHost = append(onHost, pod.Namespace+"/"+pod.Name)
			continue
		}
		i := slices.IndexFunc(id.ServiceAccounts, func(a Account) bool { return a.Namespace == pod.Namespace && a.Name == pod.ServiceAccount })
		if i < 0 {
			i = len(id.ServiceAccounts)
			id.ServiceAccounts = append(id.ServiceAccounts, Account{Namespace: pod.Namespace, Name: pod.ServiceAccount})
		}
		id.ServiceAccounts[i].Pods++
	}
	if len(onHost) > 0 {
		id.Problems = append(id.Problems, "pods on the host network ask IMDS themselves, and lose it when it leaves the node: "+strings.Join(onHost, ", "))
	}
}

// addCredentials adds what makes Entra accept the service accounts, and then the annotation. The
// identity needs as many credentials, other AzureIdentities included.
func (id *Identity) addCredentials(credentials int, o Options) {
	id.State = Ready
	var own []Account
	for _, a := range id.ServiceAccounts {
		if a.shared() {
			id.Problems = append(id.Problems, fmt.Sprintf("pods in namespace %s (%d) have the service account default, as all pods there without one of their own: a federated credential for it would be for all of those. Give them their own first (serviceAccountName)", a.Namespace, a.Pods))
			continue
		}
		own = append(own, a)
	}
	if len(id.ServiceAccounts) == 0 && len(id.Problems) == 0 {
		id.State = Unused
		return
	}
	if credentials > maxCredentials && !o.IdentityBindings {
		others := ""
		if credentials > len(own) {
			others = " (other AzureIdentities name it, too)"
		}
		id.Problems = append(id.Problems, fmt.Sprintf("it needs %d federated credentials%s, and can have %d: see --identity-bindings", credentials, others, maxCredentials))
	}
	id.Commands = append(id.Commands, id.grants(own, o)...)
	if len(id.Problems) > 0 {
		id.State = Blocked
		return
	}
	id.Commands = append(id.Commands, fmt.Sprintf("kubectl --namespace=%s annotate azureidentity %s %s=true", quote(id.Namespace), quote(id.Name), aadpodidentity.FederatedAnnotation))
}

// mayLeave reports whether no AzureIdentity needs the identity on the nodes.
func mayLeave(in podresolver.BoundIdentity, inventory podresolver.Inventory) bool {
	if !in.Federated || in.ResourceID == "" {
		return false
	}
	for _, other := range inventory.Identities {
		if sameOnNode(in, other) && !other.Federated && len(other.Bindings) > 0 {
			return false
		}
	}
	for _, pod := range inventory.Pods {
		if pod.HostNetwork && slices.ContainsFunc(pod.Identities, func(has podresolver.Identity) bool { return has.Namespace == in.Namespace && has.Name == in.Name }) {
			return false
		}
	}
	return true
}

// sameOnNode reports whether two AzureIdentities name one identity, and the other one is no service
// principal.
func sameOnNode(in, other podresolver.BoundIdentity) bool {
	same := other.ClientID != "" && other.ClientID == in.ClientID || other.ResourceID != "" && other.ResourceID == in.ResourceID
	return same && other.Type == aadpodidentity.UserAssignedMSI
}
