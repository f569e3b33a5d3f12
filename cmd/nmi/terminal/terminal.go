// Package terminal prints lines for people: with marks, with colors only on a terminal, and
// with nothing from the cluster or the node that could control the terminal.
package terminal

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Mark is the first word of a line, with its color (ECMA-48, SGR).
type Mark struct{ text, color string }

// The marks.
var (
	OK      = Mark{"√", "\x1b[32m"}
	Warning = Mark{"‼", "\x1b[33m"}
	Failed  = Mark{"×", "\x1b[31m"}
	None    = Mark{"-", "\x1b[2m"}
)

const (
	bold  = "\x1b[1m"
	reset = "\x1b[0m"
)

// Printer prints lines.
type Printer struct {
	Out   io.Writer
	Color bool
}

// New returns a Printer with colors if out is a terminal, and NO_COLOR is not set
// (https://no-color.org).
func New(out io.Writer) Printer {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return Printer{Out: out}
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS) //nolint:gosec // a descriptor is small
	return Printer{Out: out, Color: err == nil}
}

// Text is clean, and may have colors: Line prints it as it is.
type Text string

// Line prints a line. Strings among its arguments are cleaned.
func (p Printer) Line(format string, args ...any) {
	for i, arg := range args {
		if text, ok := arg.(string); ok {
			args[i] = Clean(text)
		}
	}
	_, _ = fmt.Fprintf(p.Out, format+"\n", args...) // it fails when the reader has gone
}

// Mark returns a mark in its color.
func (p Printer) Mark(m Mark) Text { return p.colored(m.color, m.text) }

// Paint returns text in a mark's color.
func (p Printer) Paint(m Mark, text string) Text { return p.colored(m.color, text) }

// Bold returns bold text.
func (p Printer) Bold(text string) Text { return p.colored(bold, text) }

func (p Printer) colored(color, text string) Text {
	if text = Clean(text); p.Color {
		text = color + text + reset
	}
	return Text(text)
}

// Clean replaces characters that could control a terminal, or make a text look like another
// one, such as those that change the direction of writing.
func Clean(text string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, strings.ReplaceAll(text, "\n", " "))
}
