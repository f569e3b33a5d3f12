package main

import (
	"encoding/json"
	"io"

	"github.com/spf13/pflag"
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
	encoder.SetEscapeHTML(false) // or <pod> is unreadable
	return encoder.Encode(value)
}
