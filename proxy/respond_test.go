package proxy

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache"
)

// expires_in is what is left when the answer is given, not when the token was made.
func TestExpiresIn(t *testing.T) {
	made := time.Unix(1_800_000_000, 0)
	token := &tokencache.Token{
		AccessToken: "a.b", ClientID: `"quoted"`, Resource: "r\\\n\x7f\u00e9", TokenType: "Bearer", NotBefore: made,
		ExpiresOn: made.Add(time.Hour), ExpiresIn: time.Hour, ExtExpiresOn: made.Add(2 * time.Hour),
	}
	for later, left := range map[time.Duration][2]string{
		0: {"3600", "7200"}, 10 * time.Minute: {"3000", "6600"}, 90 * time.Minute: {"0", "1800"}, 3 * time.Hour: {"0", "0"},
	} {
		want := `{"access_token":"a.b","client_id":"\"quoted\"","expires_in":"` + left[0] + `","expires_on":"1800003600","ext_expires_in":"` + left[1] +
			`","not_before":"1800000000","resource":"r\\\n` + "\x7f\u00e9" + `","token_type":"Bearer"}`
		assert.Equal(t, want, string(appendToken(nil, token, made.Add(later).Unix())), "%s later", later)
	}
}

func TestAppendString(t *testing.T) {
	for c := range rune(0x100) {
		want := "a" + string(c) + "b"
		var got string
		require.NoError(t, json.Unmarshal(appendString(nil, want), &got), "%q", c)
		assert.Equal(t, want, got)
	}
}
