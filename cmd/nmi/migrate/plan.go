// Package migrate plans the way from identities on the nodes to federation: what each AzureIdentity
// needs before its tokens can come without the node, and what breaks when it leaves the node.
//
// The life of a plan: podresolver takes an inventory of the cluster; New turns it into steps for
// each AzureIdentity, as commands to read and run, without asking Azure anything; Print or JSON
// shows them.
package migrate

import (
	"crypto/sha256"
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
	Issuer   string // of the cluster's service account tokens; "" if it is not known
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
	// removal. Excepted pods may use it all the same.
	MayLeave bool `json:"mayLeave"`
}

// Account is a service account, and how many pods with it get the identity.
type Account struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Pods      int    `json:"pods"`
}

// New makes a plan.
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
	for _, id := range inventory.Identities {
		p.Identities = append(p.Identities, plan(id, inventory, o))
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

func plan(in podresolver.BoundIdentity, inventory podresolver.Inventory, o Options) Identity {
	id := Identity{Namespace: in.Namespace, Name: in.Name, ClientID: in.ClientID, ResourceID: in.ResourceID, Bindings: in.Bindings}
	id.addPods(inventory.Pods)
	switch {
	case in.Type == aadpodidentity.ServicePrincipal || in.Type == aadpodidentity.ServicePrincipalCertificate:
		id.State = NotOnNode
		id.Problems = append(id.Problems, "a service principal has no identity on the node, and stays as it is; with a federated credential it needs no secret: type 0, with its clientID and tenantID")
		return id
	case in.Unusable != "":
		id.State = Blocked
		id.Problems = append(id.Problems, "it "+in.Unusable)
		return id
	case in.ClientID == "":
		id.Problems = append(id.Problems, "it has no clientID, by which Entra knows it")
		id.Commands = append(id.Commands, "az identity show --query clientId --output tsv --ids "+quote(in.ResourceID))
	}
	if in.Federated {
		id.State = Moved
	} else {
		id.addCredentials(o)
	}
	id.MayLeave = mayLeave(in, inventory)
	if id.MayLeave {
		id.Commands = append(id.Commands, fmt.Sprintf(`az vmss identity remove --resource-group "$NODE_GROUP" --name "$SCALE_SET" --identities %s`, quote(in.ResourceID)))
	}
	return id
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

// addCredentials adds what makes Entra accept the service accounts, and then the annotation.
func (id *Identity) addCredentials(o Options) {
	id.State = Ready
	var own []Account
	for _, a := range id.ServiceAccounts {
		if a.Name == "default" || a.Name == "" {
			id.Problems = append(id.Problems, fmt.Sprintf("pods in namespace %s (%d) have the service account default, as all pods there without one of their own: a federated credential for it would be for all of those. Give them their own first (serviceAccountName)", a.Namespace, a.Pods))
			continue
		}
		own = append(own, a)
	}
	if len(id.ServiceAccounts) == 0 && len(id.Problems) == 0 {
		id.State = Unused
		return
	}
	if o.IdentityBindings {
		id.Commands = append(id.Commands, id.identityBinding(own)...)
	} else {
		if len(own) > maxCredentials {
			id.Problems = append(id.Problems, fmt.Sprintf("it needs %d federated credentials, and can have %d: see --identity-bindings", len(own), maxCredentials))
		}
		for _, a := range own {
			id.Commands = append(id.Commands, id.credential(a, o))
		}
	}
	if len(id.Problems) > 0 {
		id.State = Blocked
		return
	}
	id.Commands = append(id.Commands, fmt.Sprintf("kubectl --namespace=%s annotate azureidentity %s %s=true", quote(id.Namespace), quote(id.Name), aadpodidentity.FederatedAnnotation))
}

// credential is the command that creates a federated credential. Again it changes nothing.
func (id *Identity) credential(a Account, o Options) string {
	group, name, subscription := id.parts()
	subject := fmt.Sprintf("system:serviceaccount:%s:%s", a.Namespace, a.Name)
	issuer := quote(o.Issuer)
	if issuerProblem(o.Issuer) != "" {
		issuer = `"$ISSUER"`
	}
	return fmt.Sprintf("az identity federated-credential create%s --resource-group %s --identity-name %s --name %s --issuer %s --subject %s --audiences %s",
		subscription, group, name, quote(credentialName(o.Issuer, a)), issuer, quote(subject), quote(o.Audience))
}

// parts are the identity's resource group and name, and the option for its subscription, as words of
// a command. A client ID is a GUID, or its AzureIdentity is unusable.
func (id *Identity) parts() (group, name, subscription string) {
	parts := strings.Split(id.ResourceID, "/")
	const length = 9 // /subscriptions/<ID>/resourcegroups/<group>/providers/microsoft.managedidentity/userassignedidentities/<name>
	if len(parts) != length {
		return id.find("resourceGroup"), id.find("name"), ""
	}
	return quote(parts[4]), quote(parts[8]), " --subscription " + quote(parts[2])
}

// find is a word that has Azure tell a field of the identity.
func (id *Identity) find(field string) string {
	return fmt.Sprintf(`"$(az identity list --query "[?clientId=='%s'].%s" --output tsv)"`, id.ClientID, field)
}

// credentialName is the same each time, and another one for each cluster and service account: up to
// 120 letters, digits, hyphens and underscores.
func credentialName(issuer string, a Account) string {
	const most = 120 - 9
	name := strings.ReplaceAll(a.Namespace+"-"+a.Name, ".", "-")
	sum := sha256.Sum256([]byte(issuer + " " + a.Namespace + "/" + a.Name))
	return fmt.Sprintf("%s-%x", name[:min(len(name), most)], sum[:4])
}

// identityBinding are the commands for an AKS identity binding, and the right of its service accounts
// to use it (learn.microsoft.com, "Set up identity bindings on Azure Kubernetes Service").
func (id *Identity) identityBinding(accounts []Account) []string {
	_, name, _ := id.parts()
	resource := quote(id.ResourceID)
	if id.ResourceID == "" {
		resource = id.find("id")
	}
	var subjects []string
	for _, a := range accounts {
		subjects = append(subjects, fmt.Sprintf(`{"kind":"ServiceAccount","namespace":%q,"name":%q}`, a.Namespace, a.Name))
	}
	role := fmt.Sprintf("use-%s-%s", id.Namespace, id.Name)
	const api = "rbac.authorization.k8s.io"
	manifest := fmt.Sprintf(`{"apiVersion":"v1","kind":"List","items":[`+
		`{"apiVersion":"%[1]s/v1","kind":"ClusterRole","metadata":{"name":%[2]q},"rules":[{"apiGroups":["cid.wi.aks.azure.com"],"resources":[%[3]q],"verbs":["use-managed-identity"]}]},`+
		`{"apiVersion":"%[1]s/v1","kind":"ClusterRoleBinding","metadata":{"name":%[2]q},"roleRef":{"apiGroup":"%[1]s","kind":"ClusterRole","name":%[2]q},"subjects":[%[4]s]}]}`,
		api, role, id.ClientID, strings.Join(subjects, ","))
	return []string{
		fmt.Sprintf(`az aks identity-binding create --resource-group "$CLUSTER_GROUP" --cluster-name "$CLUSTER" --name %s --managed-identity-resource-id %s`, name, resource),
		"kubectl apply -f - <<< " + quote(manifest),
	}
}

// mayLeave reports whether no AzureIdentity needs the identity on the nodes.
func mayLeave(in podresolver.BoundIdentity, inventory podresolver.Inventory) bool {
	if !in.Federated || in.ResourceID == "" {
		return false
	}
	for _, other := range inventory.Identities {
		same := other.ClientID != "" && other.ClientID == in.ClientID || other.ResourceID != "" && other.ResourceID == in.ResourceID
		if same && other.Type == aadpodidentity.UserAssignedMSI && !other.Federated && len(other.Bindings) > 0 {
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

// quote makes a word of a shell's command of a text, which authors of objects choose.
func quote(text string) string {
	plain := func(r rune) bool {
		return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("-_./:=", r)
	}
	if text != "" && !strings.ContainsFunc(text, func(r rune) bool { return !plain(r) }) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
