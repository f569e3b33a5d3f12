package imdstest

import (
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestStraighten(t *testing.T) {
	const token = "/metadata/identity/oauth2/token"
	for _, target := range []string{
		token, token + "?resource=x", token + "/", "/METADATA/Identity/OAuth2/token", `/metadata\identity\oauth2\token`,
		"/metadata%2fidentity%2Foauth2/token", "/metadata%252fidentity/oauth2/token", "/metadata%5cidentity/oauth2/token",
		"//metadata//identity/oauth2/token", "/metadata/./identity/x/../oauth2/token", "/metadata/identity;v=1/oauth2/token;x",
		"/metadata/identity/oauth2/tok%65n", "http://169.254.169.254/metadata/identity/oauth2/token?x=y",
		"/metadata/instance/../identity/oauth2/token", "/metadata/instance/%2e%2e/identity/oauth2/token",
	} {
		assert.Equal(t, token, Straighten(target), target)
	}
	assert.Equal(t, "/metadata/identity/oauth2/tokenfoo", Straighten("/metadata/identity/oauth2/tokenfoo"))
	assert.Equal(t, "/", Straighten("*"[1:]))
}

func TestBodiesAreThoseOfTheService(t *testing.T) {
	known := Identity{ClientID: "c1", ObjectID: "o1", ResourceID: "/r/1"}
	fake := NewServer(Config{Identities: []Identity{known}})
	srv := fake.Start()
	defer srv.Close()
	get := func(target string, header string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL+target, nil)
		require.NoError(t, err)
		if header != "" {
			req.Header.Set("Metadata", header)
		}
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	const token = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r"

	status, body := get(token, "")
	assert.Equal(t, 400, status)
	assert.Len(t, body, 88)
	status, body = get(token+"&client_id=other", "true")
	assert.Equal(t, 400, status)
	assert.Len(t, body, 68)
	status, _ = get(token+"&client_id=C1", "true")
	assert.Equal(t, 200, status)
	status, _ = get(token, "true")
	assert.Equal(t, 200, status)

	calls := fake.Calls()
	assert.Equal(t, []string{"", "", "c1", Node}, []string{calls[0].Subject, calls[1].Subject, calls[2].Subject, calls[3].Subject})
	assert.Equal(t, 2, fake.Tokens())
	assert.Equal(t, 4, fake.Requests())
}
