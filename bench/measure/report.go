// Package measure has what the benchmarks share: rows of results, statistics, and what the
// kernel and the agent's metrics say of the agent's process.
package measure

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"
)

// Row is one figure.
type Row struct {
	Topic string  `json:"topic"` // rows of one topic are together
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"` // "" for a count or a ratio
	Goal  string  `json:"goal,omitempty"`
	Met   *bool   `json:"met,omitempty"` // whether Value is within Goal; nil without one
	Note  string  `json:"note,omitempty"`
}

// AtMost sets an upper goal.
func (r *Row) AtMost(goal float64) *Row { return r.goal("≤ "+number(goal), r.Value <= goal) }

// AtLeast sets a lower goal.
func (r *Row) AtLeast(goal float64) *Row { return r.goal("≥ "+number(goal), r.Value >= goal) }

// Exactly sets the one value that is right.
func (r *Row) Exactly(goal float64) *Row { return r.goal(number(goal), r.Value == goal) }

func (r *Row) goal(text string, met bool) *Row {
	r.Goal, r.Met = text, &met
	return r
}

// Notef says how the figure came about.
func (r *Row) Notef(format string, args ...any) *Row {
	r.Note = fmt.Sprintf(format, args...)
	return r
}

// Report is what one run of a benchmark measured, and where.
type Report struct {
	Command  string            `json:"command"`
	Date     time.Time         `json:"date"`
	Machine  string            `json:"machine"`
	Versions map[string]string `json:"versions"`
	Rows     []*Row            `json:"rows"`
}

// NewReport returns a report without rows, of this machine. binaries are Go programs whose
// versions it names.
func NewReport(command string, binaries ...string) *Report {
	r := &Report{Command: command, Date: time.Now().UTC().Truncate(time.Second), Machine: machine(), Versions: map[string]string{"go": runtime.Version()}}
	for _, path := range binaries {
		if info, err := buildinfo.ReadFile(path); err == nil {
			r.Versions[info.Main.Path] = info.Main.Version
		}
	}
	return r
}

// machine is the processor, the number of cores, and the kernel.
func machine() string {
	model := runtime.GOARCH
	cpus, _ := os.ReadFile("/proc/cpuinfo")
	if _, after, found := bytes.Cut(cpus, []byte("model name\t: ")); found {
		line, _, _ := bytes.Cut(after, []byte("\n"))
		model = string(line)
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%d cores, %s, Linux %s", runtime.NumCPU(), model, strings.TrimSpace(string(kernel)))
}

// Add appends a row, and returns it for a goal or a note.
func (r *Report) Add(topic, name string, value float64, unit string) *Row {
	row := &Row{Topic: topic, Name: name, Value: value, Unit: unit}
	r.Rows = append(r.Rows, row)
	return row
}

// Markdown writes one table. A topic is named in its first row.
func (r *Report) Markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "`%s`, %s. %s", r.Command, r.Date.Format(time.DateOnly), r.Machine)
	for _, name := range sortedKeys(r.Versions) {
		fmt.Fprintf(&b, "; %s %s", name, r.Versions[name])
	}
	b.WriteString(".\n\n| | what | measured | goal | | |\n|---|---|---:|---:|---|---|\n")
	topic := ""
	for _, row := range r.Rows {
		first := ""
		if row.Topic != topic {
			first, topic = "**"+row.Topic+"**", row.Topic
		}
		verdict := ""
		if row.Met != nil {
			verdict = "met"
			if !*row.Met {
				verdict = "**missed**"
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", first, row.Name, strings.TrimSpace(number(row.Value)+" "+row.Unit), row.Goal, verdict, row.Note)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteJSON writes the report to a file, or nowhere if path is "".
func (r *Report) WriteJSON(path string) error {
	if path == "" {
		return nil
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// number writes a value with three significant digits or more: all digits of an integer.
func number(v float64) string {
	switch {
	case v == float64(int64(v)):
		return fmt.Sprintf("%d", int64(v))
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.3g", v)
	}
}
