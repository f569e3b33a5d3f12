package sdk

import (
	"bufio"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestHeads(t *testing.T) {
	heads, err := Heads()
	require.NoError(t, err)
	assert.Len(t, heads, len(Clients), "run make bench-heads")
	for _, c := range Clients {
		head, err := Find(c.Name)
		require.NoError(t, err)
		assert.NotEmpty(t, head.Version)
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head.Text)))
		require.NoError(t, err, c.Name)
		assert.Equal(t, "/metadata/identity/oauth2/token", r.URL.Path)
		assert.Equal(t, "true", r.Header.Get("Metadata"))
		if id := r.Header.Get("X-Ms-Client-Request-Id"); id != "" {
			assert.Equal(t, ID, id, "%s: an ID of the recording", c.Name)
		}
	}
	for _, name := range []string{"azidentity", "@azure/identity"} { // those that the suite repeats
		head, err := Find(name)
		require.NoError(t, err)
		assert.Equal(t, 1, strings.Count(head.Text, ID))
	}
}

func TestParseHeadRefuses(t *testing.T) {
	for _, text := range []string{
		"", "GET / HTTP/1.1\nHost: x\n\n", "# x\nGET / HTTP/1.1\nHost: x\n\n", "# x 1\nPOST / HTTP/1.1\nHost: x\n\n",
		"# x 1\nGET / HTTP/1.1\nHost: x\n", "# x 1\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\n\n",
	} {
		_, err := parseHead(text)
		assert.Error(t, err, "%q", text)
	}
}

func TestFormatIsReadAgain(t *testing.T) {
	want := Head{Name: "an sdk", Version: "v1", Text: "GET / HTTP/1.1\r\nHost: x\r\n\r\n"}
	got, err := parseHead(want.format())
	require.NoError(t, err)
	assert.Equal(t, want, got)
}

func TestGeneralize(t *testing.T) {
	assert.Equal(t, "User-Agent: Node/20 (Linux 6.1.2; x64)\r\n\r\n", generalize("User-Agent: Node/20 (Linux 6.1.2-cloud-amd64; x64)\r\n\r\n"))
	assert.Equal(t,
		"GET / HTTP/1.1\r\nUser-Agent: Node/20 OS/(x64-Linux-6.1.2)\r\nx-ms-client-request-id: {uuid}\r\n\r\n",
		generalize("GET / HTTP/1.1\r\nUser-Agent: Node/20 OS/(x64-Linux-6.1.2-cloud-amd64)\r\nx-ms-client-request-id: 0f8fad5b-d9cb-469f-a165-70867728950e\r\n\r\n"))
	assert.Equal(t,
		"GET / HTTP/1.1\r\nX-Ms-Client-Request-Id: {uuid}\r\n\r\n",
		generalize("GET / HTTP/1.1\r\nX-Ms-Client-Request-Id: 0f8fad5b-d9cb-469f-a165-70867728950e\r\n\r\n"))
}
