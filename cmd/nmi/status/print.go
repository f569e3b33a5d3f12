package status

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

// Printer prints as text, for people.
type Printer struct{ terminal.Printer }

var marks = map[State]terminal.Mark{OK: terminal.OK, Warning: terminal.Warning, Failed: terminal.Failed, None: terminal.None}

func (p Printer) mark(state State) terminal.Text { return p.Mark(marks[state]) }

func (p Printer) paint(state State, text string) terminal.Text { return p.Paint(marks[state], text) }

// Snapshot prints what nmi status prints: what needs attention last, where a terminal ends.
func (p Printer) Snapshot(s *Snapshot) {
	verdict := s.verdict()
	p.Line("nmi %s on node %s is %s, %s mode, up %s", s.Agent.Version, s.Agent.Node,
		p.paint(verdict.State, verdict.Text), s.Agent.Mode, human(s.Time.Sub(s.Agent.Started)))
	p.Line("")
	for _, l := range s.lines() {
		p.Line("%s %-11s  %s", p.mark(l.State), l.Name, l.Text)
	}
	for _, note := range s.Agent.Notes {
		p.Line("- %s", note)
	}
	p.Line("\npods: %s", s.summary())
	p.pods(s)
	for i := range s.Pods {
		if pod := &s.Pods[i]; pod.State == Failed || pod.State == Warning {
			p.trouble(s, pod)
		}
	}
	for _, other := range s.Others {
		p.Line("\n%s address %s, which is no pod's", p.mark(Warning), other.Address)
		p.refusals(s, other.Refusals, "")
	}
	for _, problem := range s.Agent.Problems {
		p.Line("\n%s %s", p.mark(Failed), problem)
	}
	p.fix(s.Rules.Fix)
}

// pods prints a table of the pods, but for those that have and seem to want no identity.
func (p Printer) pods(s *Snapshot) {
	rows := [][]string{{"NAMESPACE", "POD", "ADDRESS", "GETS", "TOKENS", "NEXT EXPIRY"}}
	states := []State{None}
	for i := range s.Pods {
		pod := &s.Pods[i]
		if pod.State == None {
			continue
		}
		address, expiry := "", ""
		if len(pod.Addresses) > 0 {
			address = pod.Addresses[0]
		}
		if len(pod.Tokens) > 0 {
			expiry = human(pod.Tokens[0].ExpiresOn.Sub(s.Time))
		}
		rows = append(rows, []string{terminal.Clean(pod.Namespace), terminal.Clean(pod.Name), terminal.Clean(address), terminal.Clean(pod.Gets()), fmt.Sprint(pod.TokensHeld), expiry})
		states = append(states, pod.State)
	}
	if len(rows) == 1 {
		return
	}
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for n, row := range rows {
		var text strings.Builder
		for i, cell := range row {
			text.WriteString(cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		mark := p.mark(states[n])
		if n == 0 {
			mark = " "
		}
		p.Line("%s %s", mark, strings.TrimRight(text.String(), " "))
	}
}

// trouble prints why a pod is refused, and what to do.
func (p Printer) trouble(s *Snapshot, pod *Pod) {
	p.Line("\n%s %s: %s", p.mark(pod.State), pod.String(), p.paint(pod.State, pod.Reason))
	said := ""
	if pod.Answer != "" {
		said = pod.Reason
		for _, step := range pod.Steps {
			for _, text := range step.Texts {
				if step.State == Failed {
					p.Line("    %s", text)
				}
			}
		}
	}
	p.refusals(s, pod.Refusals, said)
	p.fix(pod.Fix)
}

// refusals prints them, and the text of those with another reason than has been said already.
func (p Printer) refusals(s *Snapshot, all []Refusal, said string) {
	for _, r := range all {
		when := human(s.Time.Sub(r.Last)) + " ago"
		if r.Count > 1 {
			when = fmt.Sprintf("%d times in %s, the last %s", r.Count, human(r.Last.Sub(r.First)), when)
		}
		p.Line("    %s: %d %s", when, r.Status, r.Reason)
		if r.Reason != said {
			p.Line("      %s", r.Text)
		}
	}
}

func (p Printer) fix(text string) {
	if text != "" {
		p.Line("%s %s", p.Bold("fix:"), text)
	}
}
