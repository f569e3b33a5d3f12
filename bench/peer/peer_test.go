package peer

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestCPUTimeCountsChildren(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("process namespaces need root")
	}
	p, err := Config{}.pinned(nil, "sh", "-c", "while :; do :; done & wait")
	require.NoError(t, err)
	defer func() { require.NoError(t, p.Kill()) }()
	require.Eventually(t, func() bool {
		used, err := CPUTime(p)
		require.NoError(t, err)
		return used >= 100*time.Millisecond
	}, 30*time.Second, 10*time.Millisecond)
	itself, err := p.CPUTime()
	require.NoError(t, err)
	assert.Less(t, itself, 50*time.Millisecond)
}

func TestNginxConfigHasOnlyKnownPlaceholders(t *testing.T) {
	config := fillNginxConfig("/dir", "127.0.0.1:1")
	assert.Contains(t, config, "proxy_pass http://127.0.0.1:1;")
	assert.Contains(t, config, "proxy_cache_path /dir/cache ")
	assert.NotContains(t, config, "{dir")
	assert.NotContains(t, config, "{origin")
	assert.Equal(t, strings.Count(config, "{\n"), strings.Count(config, "}\n"))
}
