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

// WriteMarkdown prints the table for the documentation. The same results give the
// same bytes.
func WriteMarkdown(w io.Writer, results []Result) error {
	var b strings.Builder
	b.WriteString("| # | case | known from | sends | result |\n|---:|---|---|---|---|\n")
	for _, r := range results {
		result := r.verdict()
		switch {
		case r.NotRun != "":
			result += ": " + cell(r.NotRun)
		case r.Failed():
			result = "**" + result + "**: " + cell(strings.Join(r.Failures, "; "))
		}
		fmt.Fprintf(&b, "%s %s |\n", MarkdownRow(r.Case), result)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// MarkdownRow is a case's row in that table, up to its result.
func MarkdownRow(c Case) string {
	return fmt.Sprintf("| %d | %s | %s: %s | %s |", c.Number, cell(c.Name), c.Mark, cell(c.Source), cell(c.Sends))
}

// cell keeps a text inside its cell.
func cell(text string) string {
	return strings.NewReplacer("|", `\|`, "\n", " ", "\r", " ", `\`, `\\`, "<", "&lt;", "*", `\*`, "_", `\_`).Replace(text)
}
