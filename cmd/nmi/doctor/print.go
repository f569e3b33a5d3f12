package doctor

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// WriteJSON writes the report as JSON.
func (r Report) WriteJSON(out io.Writer) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(r)
}

// Table prints results as text, a line each, and why a check does not succeed below it.
type Table struct {
	Out   io.Writer
	Color bool
	begun bool
}

// marks are the first words of lines, and their colors (ECMA-48, SGR).
var marks = map[string]struct{ mark, color string }{
	Success: {"√", "\x1b[32m"},
	Warning: {"‼", "\x1b[33m"},
	Error:   {"×", "\x1b[31m"},
	Skipped: {"-", "\x1b[2m"},
}

// Category implements Printer.
func (t *Table) Category(name string) {
	if t.begun {
		t.printf("\n")
	}
	t.begun = true
	t.printf("%s\n%s\n", name, strings.Repeat("-", len(name)))
}

// Result implements Printer.
func (t *Table) Result(r Result) {
	t.printf("%s %s\n", t.mark(r.Result), r.Description)
	if r.Error == "" {
		return
	}
	text := r.Error
	if r.Result == Skipped {
		text = "skipped: " + text
	}
	t.printf("    %s\n", strings.ReplaceAll(text, "\n", "\n    "))
	if r.Result != Skipped {
		t.printf("    see %s\n", r.Hint)
	}
}

// Summary prints the last lines.
func (t *Table) Summary(r Report) {
	result := Success
	if !r.Success {
		result = Error
	}
	t.printf("\n%s %d checks succeeded, %d warned, %d failed, %d were skipped\n", t.mark(result),
		r.Count(Success), r.Count(Warning), r.Count(Error), r.Count(Skipped))
}

// printf prints. Nobody hears of what cannot be printed.
func (t *Table) printf(format string, args ...any) { _, _ = fmt.Fprintf(t.Out, format, args...) }

func (t *Table) mark(result string) string {
	m := marks[result]
	if !t.Color {
		return m.mark
	}
	return m.color + m.mark + "\x1b[0m"
}

// Silent prints nothing.
type Silent struct{}

// Category implements Printer.
func (Silent) Category(string) {}

// Result implements Printer.
func (Silent) Result(Result) {}
