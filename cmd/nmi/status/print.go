package status

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Printer prints as text, for people.
type Printer struct {
	Out   io.Writer
	Color bool
}

// marks are the first words of lines, and their colors (ECMA-48, SGR).
var marks = map[State]struct{ mark, color string }{
	OK:      {"√", "\x1b[32m"},
	Warning: {"‼", "\x1b[33m"},
	Failed:  {"×", "\x1b[31m"},
	None:    {"-", "\x1b[2m"},
}

// colored is text that line prints as it is.
type colored string

// paint colors text as its state's mark.
func (p Printer) paint(state State, text string) colored {
	if !p.Color {
		return colored(clean(text))
	}
	return colored(marks[state].color + clean(text) + "\x1b[0m")
}

func (p Printer) mark(state State) colored { return p.paint(state, marks[state].mark) }

// line prints a line. Its arguments, which pods and objects have a say in, cannot control the
// terminal.
func (p Printer) line(format string, args ...any) {
	for i, arg := range args {
		if text, ok := arg.(string); ok {
			args[i] = clean(text)
		}
	}
	_, _ = fmt.Fprintf(p.Out, format+"\n", args...) // it fails when nobody reads any more
}

// clean replaces what could control a terminal, or show as another text than it is.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, strings.ReplaceAll(text, "\n", " "))
}

// Snapshot prints what nmi status prints: what needs attention last, where a terminal ends.
func (p Printer) Snapshot(s *Snapshot) {
	verdict := s.verdict()
	p.line("nmi %s on node %s is %s, %s mode, up %s", s.Agent.Version, s.Agent.Node,
		p.paint(verdict.State, verdict.Text), s.Agent.Mode, human(s.Time.Sub(s.Agent.Started)))
	p.line("")
	for _, l := range s.lines() {
		p.line("%s %-11s  %s", p.mark(l.State), l.Name, l.Text)
	}
	for _, note := range s.Agent.Notes {
		p.line("- %s", note)
	}
	p.line("\npods: %s", s.summary())
	p.pods(s)
	for i := range s.Pods {
		if pod := &s.Pods[i]; pod.State == Failed || pod.State == Warning {
			p.trouble(s, pod)
		}
	}
	for _, other := range s.Others {
		p.line("\n%s address %s, which is no pod's", p.mark(Warning), other.Address)
		p.refusals(s, other.Refusals, "")
	}
	for _, problem := range s.Agent.Problems {
		p.line("\n%s %s", p.mark(Failed), problem)
	}
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
		rows = append(rows, []string{clean(pod.Namespace), clean(pod.Name), clean(address), clean(pod.Gets()), fmt.Sprint(pod.TokensHeld), expiry})
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
		p.line("%s %s", mark, strings.TrimRight(text.String(), " "))
	}
}

// trouble prints why a pod is refused, and what to do.
func (p Printer) trouble(s *Snapshot, pod *Pod) {
	p.line("\n%s %s: %s", p.mark(pod.State), pod.String(), p.paint(pod.State, pod.Reason))
	said := ""
	if pod.Answer != "" {
		said = pod.Reason
		for _, step := range pod.Steps {
			for _, text := range step.Texts {
				if step.State == Failed {
					p.line("    %s", text)
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
		p.line("    %s: %d %s", when, r.Status, r.Reason)
		if r.Reason != said {
			p.line("      %s", r.Text)
		}
	}
}

func (p Printer) fix(text string) {
	if text != "" {
		p.line("%s %s", p.bold("fix:"), text)
	}
}

func (p Printer) bold(text string) colored {
	if !p.Color {
		return colored(text)
	}
	return colored("\x1b[1m" + text + "\x1b[0m")
}
