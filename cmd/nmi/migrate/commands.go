package migrate

import (
	"crypto/sha256"
	"fmt"
	"strings"
)

// grants are the commands that make Entra accept service accounts. Each may be run again.
func (id *Identity) grants(accounts []Account, o Options) (commands []string) {
	if len(accounts) == 0 || o.IdentityBindings && id.ClientID == "" {
		return nil
	}
	commands = id.checks()
	if o.IdentityBindings {
		return append(commands, id.identityBinding(accounts)...)
	}
	for _, a := range accounts {
		commands = append(commands, id.credential(a, o))
	}
	return commands
}

// checks are commands that print a line if the scale set has the identity, and if its client ID is its
// own. Authors of AzureIdentities may name any identity, and two in one.
func (id *Identity) checks() []string {
	const grep = "grep --ignore-case --fixed-strings --line-regexp "
	onNode := grep + id.resource() +
		` <<< "$(az vmss identity show --resource-group "$NODE_GROUP" --name "$SCALE_SET" --query 'keys(userAssignedIdentities)' --output tsv)"`
	if id.ClientID == "" || id.ResourceID == "" {
		return []string{onNode}
	}
	return []string{onNode, grep + id.ClientID + ` <<< "$(az identity show --query clientId --output tsv --ids ` + quote(id.ResourceID) + `)"`}
}

// credential is the command that creates a federated credential.
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

// resource is the identity's resource ID, as a word.
func (id *Identity) resource() string {
	if id.ResourceID == "" {
		return id.find("id")
	}
	return quote(id.ResourceID)
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
// to use it (learn.microsoft.com, "Set up identity bindings on Azure Kubernetes Service"). It is called
// by the client ID: identities of several resource groups may have one name.
func (id *Identity) identityBinding(accounts []Account) []string {
	var subjects []string
	for _, a := range accounts {
		subjects = append(subjects, fmt.Sprintf(`{"kind":"ServiceAccount","namespace":%q,"name":%q}`, a.Namespace, a.Name))
	}
	role := fmt.Sprintf("use:%s:%s", id.Namespace, id.Name) // neither can have a colon
	const api = "rbac.authorization.k8s.io"
	manifest := fmt.Sprintf(`{"apiVersion":"v1","kind":"List","items":[`+
		`{"apiVersion":"%[1]s/v1","kind":"ClusterRole","metadata":{"name":%[2]q},"rules":[{"apiGroups":["cid.wi.aks.azure.com"],"resources":[%[3]q],"verbs":["use-managed-identity"]}]},`+
		`{"apiVersion":"%[1]s/v1","kind":"ClusterRoleBinding","metadata":{"name":%[2]q},"roleRef":{"apiGroup":"%[1]s","kind":"ClusterRole","name":%[2]q},"subjects":[%[4]s]}]}`,
		api, role, id.ClientID, strings.Join(subjects, ","))
	return []string{
		fmt.Sprintf(`az aks identity-binding create --resource-group "$CLUSTER_GROUP" --cluster-name "$CLUSTER" --name %s --managed-identity-resource-id %s`, id.ClientID, id.resource()),
		"kubectl apply -f - <<< " + quote(manifest),
	}
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
