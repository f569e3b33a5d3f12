package doctor

import (
	"strings"

	"github.com/podidentity/nmi/cmd/nmi/terminal"
)

// Table prints results as text, a line each, and why a check does not succeed below it.
type Table struct {
	terminal.Printer
	begun bool
}

var marks = map[string]terminal.Mark{Success: terminal.OK, Warning: terminal.Warning, Error: terminal.Failed, Skipped: terminal.None}

// Category implements Printer.
func (t *Table) Category(name string) {
	if t.begun {
		t.Line("")
	}
	t.begun = true
	t.Line("%s\n%s", name, strings.Repeat("-", len(name)))
}

// Result implements Printer.
func (t *Table) Result(r Result) {
	t.Line("%s %s", t.Mark(marks[r.Result]), r.Description)
	if r.Error == "" {
		return
	}
	text := r.Error
	if r.Result == Skipped {
		text = "skipped: " + text
	}
	for line := range strings.SplitSeq(text, "\n") {
		t.Line("    %s", line)
	}
	if r.Result != Skipped {
		t.Line("    see %s", r.Hint)
	}
}

// Summary prints the last lines.
func (t *Table) Summary(r Report) {
	result := Success
	if !r.Success {
		result = Error
	}
	t.Line("\n%s %d checks succeeded, %d warned, %d failed, %d were skipped", t.Mark(marks[result]),
		r.Count(Success), r.Count(Warning), r.Count(Error), r.Count(Skipped))
}

// Silent prints nothing.
type Silent struct{}

// Category implements Printer.
func (Silent) Category(string) {}

// Result implements Printer.
func (Silent) Result(Result) {}
