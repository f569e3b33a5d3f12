package terminal

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLine(t *testing.T) {
	printed := func(color bool) string {
		var out strings.Builder
		p := Printer{Out: &out, Color: color}
		p.Line("%s %s %d %s", p.Mark(Failed), "a\x1b[2J\u202eb\nc\xff", 2, p.Bold("fix:\x07"))
		return out.String()
	}
	assert.Equal(t, "× a�[2J�b c� 2 fix:�\n", printed(false))
	assert.Equal(t, "\x1b[31m×\x1b[0m a�[2J�b c� 2 \x1b[1mfix:�\x1b[0m\n", printed(true))
}

func TestColorsOnATerminalOnly(t *testing.T) {
	assert.False(t, New(new(strings.Builder)).Color)
	file, err := os.Create(t.TempDir() + "/file")
	require.NoError(t, err)
	defer file.Close()
	assert.False(t, New(file).Color)

	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	require.NoError(t, err)
	defer terminal.Close()
	assert.True(t, New(terminal).Color)
	t.Setenv("NO_COLOR", "1")
	assert.False(t, New(terminal).Color)
}
