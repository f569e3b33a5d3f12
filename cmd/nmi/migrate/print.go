package migrate

import (
	"fmt"
	"strings"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

var marks = map[State]terminal.Mark{Moved: terminal.OK, Ready: terminal.OK, Blocked: terminal.Warning, Unused: terminal.None, NotOnNode: terminal.None}

// maxNamed bounds the pods that are named.
const maxNamed = 20

// Print prints the plan for people.
func (p *Plan) Print(out terminal.Printer) {
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
