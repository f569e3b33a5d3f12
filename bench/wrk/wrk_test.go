package wrk

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	got, err := parse("Running 1s test @ http://x\n  50000 requests in 1.00s\n" +
		"\nreport: {\"requests\":50000,\"duration_us\":2000000,\"p50_us\":600,\"p99_us\":2400,\"p999_us\":9000,\"failed\":0}\n")
	require.NoError(t, err)
	assert.Equal(t, Result{
		Requests: 50000, PerSecond: 25000,
		P50: 600 * time.Microsecond, P99: 2400 * time.Microsecond, P999: 9 * time.Millisecond,
	}, got)
}

func TestParseRefuses(t *testing.T) {
	for name, output := range map[string]string{
		"no report":       "unable to connect to 169.254.169.254:80 Connection refused\n",
		"malformed":       "\nreport: {\"requests\":",
		"failed requests": "\nreport: {\"requests\":50,\"duration_us\":1000000,\"failed\":1}\n",
		"no requests":     "\nreport: {\"requests\":0,\"duration_us\":1000000,\"failed\":0}\n",
	} {
		_, err := parse(output)
		assert.Error(t, err, name)
	}
}

func TestArguments(t *testing.T) {
	l := Load{Core: 1, Connections: 32, URL: "http://x/", Close: true}
	assert.Equal(t, []string{"-c", "1", "wrk", "-t1", "-c32", "-d5s", "--timeout", "30s", "-s", "file", "-H", "Metadata: true", "-H", "Connection: close", "http://x/"},
		l.arguments("file", 5*time.Second))
	l = Load{Core: 1, Connections: 32, URL: "http://x/", Head: "GET / HTTP/1.1\r\n\r\n"}
	assert.Equal(t, []string{"--", l.Head}, l.arguments("file", 5*time.Second)[13:])
}
