package conformance

import (
	"fmt"
	"io"
	"strings"
)

// verdict is a result in a word.
func (r Result) verdict() string {
	switch {
	case r.NotRun != "":
		return "not run"
	case r.Failed():
		return "FAILS"
	default:
		return "passes"
	}
}

// WriteText prints the results for a terminal.
func WriteText(w io.Writer, results []Result) error {
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "%2d  %-7s  %s  %s\n", r.Number, r.verdict(), r.Mark, r.Name)
		if r.NotRun != "" {
			fmt.Fprintf(&b, "                %s\n", r.NotRun)
		}
		for _, failure := range r.Failures {
			fmt.Fprintf(&b, "                %s\n", failure)
		}
	}
	fmt.Fprintf(&b, "%s\n", Summary(results))
	_, err := io.WriteString(w, b.String())
	return err
}

// Summary counts the results in a sentence.
func Summary(results []Result) string {
	count := map[string]int{}
	for _, r := range results {
		count[r.verdict()]++
	}
	return fmt.Sprintf("%d cases: %d pass, %d fail, %d not run", len(results), count["passes"], count["FAILS"], count["not run"])
}

// Column is a run in a table of several.
type Column struct {
	Title   string
	Results []Result // of the same cases in each
}

// WriteMarkdown prints the table for the documentation. The same results give the
// same bytes.
func WriteMarkdown(w io.Writer, columns ...Column) error {
	var b strings.Builder
	b.WriteString("| # | case | known from | sends |")
	for _, c := range columns {
		fmt.Fprintf(&b, " %s |", cell(c.Title))
	}
	b.WriteString("\n|---:|---|---|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for i, r := range columns[0].Results {
		b.WriteString(MarkdownRow(r.Case))
		for _, c := range columns {
			fmt.Fprintf(&b, " %s |", c.Results[i].markdown())
		}
		b.WriteString("\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// markdown is a result in its cell.
func (r Result) markdown() string {
	switch {
	case r.NotRun != "":
		return r.verdict() + ": " + cell(r.NotRun)
	case r.Failed():
		return "**" + r.verdict() + "**: " + cell(strings.Join(r.Failures, "; "))
	default:
		return r.verdict()
	}
}

// MarkdownRow is a case's row in that table, up to its results.
func MarkdownRow(c Case) string {
	return fmt.Sprintf("| %d | %s | %s: %s | %s |", c.Number, cell(c.Name), c.Mark, cell(c.Source), cell(c.Sends))
}

// cell keeps a text inside its cell.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "\n", " ", "\r", " ", `\`, `\\`, "<", "&lt;", "*", `\*`, "_", `\_`).Replace(text)
}
