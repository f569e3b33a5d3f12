package main

import (
	"encoding/json"
	"io"
	"os"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// Formats of --output.
const (
	outputTable = "table"
	outputJSON  = "json"
)

// addOutput adds --output, -o.
func addOutput(fs *pflag.FlagSet, output *string) {
	one := pflag.NewFlagSet("", pflag.ContinueOnError)
	parsedVar(one, output, "output", outputTable, oneOf(outputTable, outputJSON), `"table" or "json"`)
	one.Lookup("output").Shorthand = "o"
	fs.AddFlagSet(one)
}

// writeIndented writes JSON.
func writeIndented(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// isTerminal reports whether somebody reads what is written, on a terminal that may have colors
// (https://no-color.org).
func isTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS) //nolint:gosec // a descriptor is small
	return err == nil
}
