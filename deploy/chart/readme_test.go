package chart

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"
)

// keyLine is the line of a value in values.yaml: one of the top, or one of a section.
var keyLine = regexp.MustCompile(`^(  )?([A-Za-z]+):(.*)$`)

// valuesTable returns a table of all values with their defaults and comments. Each value must
// have a comment.
func valuesTable(t *testing.T, values string) string {
	t.Helper()
	var defaults map[string]any
	require.NoError(t, yaml.Unmarshal([]byte(values), &defaults))
	table := "| value | default | meaning |\n|---|---|---|\n"
	var section string
	var comment []string
	for line := range strings.Lines(values) {
		line = strings.TrimSuffix(line, "\n")
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "# "); ok {
			comment = append(comment, text)
			continue
		}
		key := keyLine.FindStringSubmatch(line)
		if key == nil {
			if line == "" {
				comment = nil
			}
			continue
		}
		inSection, name, rest := key[1] != "", key[2], key[3]
		if !inSection && rest == "" {
			section = name
		} else {
			value := defaults[name]
			if inSection {
				fields, ok := defaults[section].(map[string]any)
				require.True(t, ok, section)
				value, name = fields[name], section+"."+name
			}
			require.NotEmpty(t, comment, "%s has no comment in values.yaml", name)
			text, err := json.Marshal(value)
			require.NoError(t, err)
			table += fmt.Sprintf("| `%s` | `%s` | %s |\n", name, text, strings.ReplaceAll(strings.Join(comment, " "), "|", "\\|"))
		}
		comment = nil
	}
	return table
}
