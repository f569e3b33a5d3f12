package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the tables of docs/flags.md (make docs)")

const (
	flagsDoc  = "../../docs/flags.md"
	tableHead = "| flag | default | meaning |\n|---|---|---|\n"
	tableEnd  = "<!-- end -->"
)

// TestFlagsDoc compares the tables of docs/flags.md with the flags. Each table stands
// between "<!-- flags: <group> -->" and "<!-- end -->"; the rest is written by hand.
func TestFlagsDoc(t *testing.T) {
	t.Setenv("FORCENAMESPACED", "") // it changes a default
	doc, err := os.ReadFile(flagsDoc)
	require.NoError(t, err)
	page := string(doc)
	var starts []string
	for _, group := range newConfig().flagGroups() {
		start := "<!-- flags: " + group.name + " -->\n"
		starts = append(starts, strings.TrimSpace(start))
		before, rest, found := strings.Cut(page, start)
		require.True(t, found, "docs/flags.md has no %q", start)
		table, after, found := strings.Cut(rest, tableEnd)
		require.True(t, found, "docs/flags.md has no %q after %q", tableEnd, start)
		want := tableHead + flagRows(t, group)
		if *update {
			page = before + start + want + tableEnd + after
			continue
		}
		assert.Equal(t, want, table, "the table of the flags %q is stale: run make docs", group.name)
	}
	assert.Equal(t, starts, regexp.MustCompile(`<!-- flags: .* -->`).FindAllString(page, -1), "groups in their order")
	if *update {
		require.NoError(t, os.WriteFile(flagsDoc, []byte(page), 0o644)) //nolint:gosec // a page for everybody
	}
}

// flagRows returns the rows of a group's table.
func flagRows(t *testing.T, group flagGroup) string {
	t.Helper()
	fs := pflag.NewFlagSet(group.name, pflag.ContinueOnError)
	fs.SortFlags = false
	group.add(fs)
	var rows strings.Builder
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		require.NotEmpty(t, f.Usage, f.Name)
		value := f.DefValue
		if value != "" {
			value = "`" + value + "`"
		}
		meaning := sentence(strings.TrimPrefix(f.Usage, accepted))
		if !ofOldNMI(f.Name) {
			meaning += " New."
		}
		assert.NotContains(t, value+meaning, "|", "--%s: it ends a cell of the table", f.Name)
		fmt.Fprintf(&rows, "| `--%s` | %s | %s |\n", f.Name, value, markCode(meaning))
	})
	return rows.String()
}

// ofOldNMI reports whether the NMI of aad-pod-identity has the flag.
func ofOldNMI(name string) bool {
	return slices.ContainsFunc(oldNMIFlags, func(arg string) bool {
		old, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		return old == name
	})
}

func sentence(usage string) string {
	runes := []rune(usage)
	runes[0] = unicode.ToUpper(runes[0])
	return string(runes) + "."
}

// code is what is code in a usage: what is quoted, flags, placeholders, variables and paths.
var code = regexp.MustCompile(`"[^"]*"|--\w[\w-]*(?:=\w+)?|<\S*>|\$\(\w+\)|\w+=\w+|deploy/[\w/-]+\.yaml|(?:/[A-Za-z][\w-]+)+`)

func markCode(usage string) string {
	return code.ReplaceAllStringFunc(usage, func(text string) string {
		if quoted := strings.Trim(text, `"`); quoted != "" {
			text = quoted
		}
		return "`" + text + "`"
	})
}

func TestMarkCode(t *testing.T) {
	for usage, want := range map[string]string{
		`to --a-b=c, with --d`:               "to `--a-b=c`, with `--d`",
		`<key>[=<value>]:<effect>, $(X)`:     "`<key>[=<value>]:<effect>`, `$(X)`",
		`/metadata/xy of deploy/a.yaml, 9/s`: "`/metadata/xy` of `deploy/a.yaml`, 9/s",
		`"the words"; "" for none`:           "`the words`; `\"\"` for none",
		`X=true is plain`:                    "`X=true` is plain",
	} {
		assert.Equal(t, want, markCode(usage))
	}
}
