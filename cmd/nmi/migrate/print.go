package migrate

import (
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

var marks = map[State]terminal.Mark{Moved: terminal.OK, Ready: terminal.OK, Blocked: terminal.Warning, Unused: terminal.None, NotOnNode: terminal.None}

// maxNamed bounds the pods that are named.
const maxNamed = 20

// meanings are said of states that others could take for more than they are.
var meanings = map[State]string{
	Ready: "nothing that is known keeps it from being moved by its commands; the last of them turns federation on, for all its pods at once",
	Moved: "its annotation says so; whether Entra gives it tokens, nmi explain <namespace>/<pod> knows on the pod's node",
}

// variables are assignments of the variables in commands, in an order in which they work.
func (p *Plan) variables() (used []string) {
	const cluster, group = "CLUSTER", "CLUSTER_GROUP"
	show := func(query string) string {
		return fmt.Sprintf(`"$(az aks show --resource-group "$%s" --name "$%s" --query %s --output tsv)"`, group, cluster, query)
	}
	all := []struct {
		name, value string
		needs       []string
	}{
		{name: "SCALE_SET", value: `<that of the nodes, one of: az vmss list --resource-group "$NODE_GROUP" --query '[].name' --output tsv>`, needs: []string{"NODE_GROUP"}},
		{name: "NODE_GROUP", value: show("nodeResourceGroup"), needs: []string{cluster, group}},
		{name: "ISSUER", value: show("oidcIssuerProfile.issuerUrl"), needs: []string{cluster, group}},
		{name: cluster, value: "<name of the AKS cluster>"},
		{name: group, value: "<resource group of the AKS cluster>"},
	}
	var commands strings.Builder
	for _, id := range p.Identities {
		for _, c := range id.Commands {
			commands.WriteString(c)
		}
	}
	needed := make(map[string]bool)
	for _, v := range all {
		if !needed[v.name] && !strings.Contains(commands.String(), `"$`+v.name+`"`) {
			continue
		}
		for _, n := range v.needs {
			needed[n] = true
		}
		used = append(used, v.name+"="+v.value)
	}
	slices.Reverse(used)
	return used
}

// Print prints the plan for people.
func (p *Plan) Print(out terminal.Printer) {
	if used := p.variables(); len(used) > 0 {
		out.Line("The commands below take these variables of a shell. Read them before you run them: this has changed nothing.")
		for _, v := range used {
			out.Line("    %s", v)
		}
		out.Line("")
	}
	count := make(map[State]int)
	for _, id := range p.Identities {
		count[id.State]++
		id.print(out)
	}
	if len(p.Identities) == 0 {
		out.Line("there are no AzureIdentities")
	}
	for _, problem := range p.Problems {
		out.Line("%s %s", out.Mark(terminal.Warning), problem)
	}
	for i, pod := range p.Excepted {
		if i == maxNamed {
			out.Line("  and %d more", len(p.Excepted)-maxNamed)
			break
		}
		out.Line("  %s", pod)
	}
	for _, s := range []State{Ready, Moved} {
		if count[s] > 0 {
			out.Line("%s: %s", s, meanings[s])
		}
	}
	out.Line("moved: %d, ready: %d, blocked: %d, unused: %d, not on the node: %d", count[Moved], count[Ready], count[Blocked], count[Unused], count[NotOnNode])
}

func (id *Identity) print(out terminal.Printer) {
	out.Line("%s AzureIdentity %s/%s: %s", out.Mark(marks[id.State]), id.Namespace, id.Name, out.Bold(string(id.State)))
	var accounts []string
	for _, a := range id.ServiceAccounts {
		accounts = append(accounts, fmt.Sprintf("%s/%s (pods: %d)", a.Namespace, a.Name, a.Pods))
	}
	if len(accounts) > 0 {
		out.Line("  service accounts: %s", strings.Join(accounts, ", "))
	}
	for _, problem := range id.Problems {
		out.Line("  %s %s", out.Mark(terminal.Warning), problem)
	}
	if id.MayLeave {
		out.Line("  may leave the scale set now")
	}
	for _, command := range id.Commands {
		out.Line("    %s", command)
	}
	out.Line("")
}
