package upstream

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache"
)

// answerWith replaces fields of a valid answer; nil removes a field.
func answerWith(fields map[string]any) string {
	all := map[string]any{
		"access_token": `"secret"`, "client_id": `"` + key.ClientID + `"`, "expires_in": `"86399"`, "expires_on": `"1700086399"`,
		"ext_expires_in": `"86399"`, "not_before": `"1700000000"`, "resource": `"` + key.Resource + `"`, "token_type": `"Bearer"`,
	}
	for name, value := range fields {
		all[name] = value
	}
	var b strings.Builder
	for name, value := range all {
		if value != nil {
			fmt.Fprintf(&b, `,%q:%v`, name, value)
		}
	}
	return "{" + b.String()[1:] + "}"
}

func TestParseToken(t *testing.T) {
	type fields = map[string]any
	now := time.Unix(1_700_000_000, 0)
	byResource := tokencache.Key{ResourceID: known.ResourceID, Resource: key.Resource}
	for name, tc := range map[string]struct {
		fields fields
		key    tokencache.Key
		err    string
	}{
		"as the service sends it":       {nil, key, ""},
		"numbers instead of strings":    {fields{"expires_on": 1700086399, "expires_in": 86399, "ext_expires_in": 0}, key, ""},
		"no expires_on":                 {fields{"expires_on": nil}, key, ""},
		"client_id in capitals":         {fields{"client_id": `"` + strings.ToUpper(key.ClientID) + `"`}, key, ""},
		"empty not_before":              {fields{"not_before": `""`}, key, ""},
		"null ext_expires_in":           {fields{"ext_expires_in": "null"}, key, ""},
		"asked for by resource ID":      {nil, byResource, ""},
		"another spelling":              {fields{"resource": `"HTTPS://Vault.azure.net"`}, key, ""},
		"no token":                      {fields{"access_token": `""`}, key, "no access_token"},
		"a token with a quote":          {fields{"access_token": `"secret\""`}, key, "characters that no bearer token has"},
		"no type":                       {fields{"token_type": nil}, key, "no token_type"},
		"another resource":              {fields{"resource": `"secret"`}, key, "wrong resource"},
		"another path":                  {fields{"resource": `"https://vault.azure.net/x"`}, key, "wrong resource"},
		"a slash as the resource":       {fields{"resource": `"/"`}, tokencache.Key{ClientID: key.ClientID, Resource: "/"}, "wrong resource"},
		"no resource":                   {fields{"resource": nil}, key, "wrong resource"},
		"another identity":              {fields{"client_id": `"secret"`}, key, "wrong client_id"},
		"no identity":                   {fields{"client_id": nil}, key, "no client_id"},
		"no identity, by resource ID":   {fields{"client_id": `""`}, byResource, "no client_id"},
		"no expiry":                     {fields{"expires_on": nil, "expires_in": nil}, key, "neither expires_on nor expires_in"},
		"empty expiry":                  {fields{"expires_on": `""`, "expires_in": `""`}, key, "neither expires_on nor expires_in"},
		"expires in a year":             {fields{"expires_on": `"1731536000"`}, key, "check the node's clock"},
		"expires_on in milliseconds":    {fields{"expires_on": `"1700086399000"`}, key, "check the node's clock"},
		"expires_on before 1970":        {fields{"expires_on": `"-9223372036854775808"`}, key, "check the node's clock"},
		"expires_on out of range":       {fields{"expires_on": `"9223372036854775807"`}, key, "check the node's clock"},
		"expires_in out of range":       {fields{"expires_on": nil, "expires_in": `"9223372036854775807"`}, key, "implausible expires_in"},
		"negative expires_in":           {fields{"expires_in": `"-1"`}, key, "implausible expires_in -1"},
		"a date instead of a number":    {fields{"expires_on": `"11/21/2026 10:00"`}, key, "malformed number: want whole seconds"},
		"the token instead of a number": {fields{"expires_in": `"secret"`}, key, "malformed number: want whole seconds"},
		"a list instead of a token":     {fields{"access_token": `["a"]`}, key, "wrong type of access_token"},
		"a number instead of a token":   {fields{"access_token": `12345`}, key, "wrong type of access_token"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := parseToken([]byte(answerWith(tc.fields)), tc.key, now)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				assert.NotContains(t, err.Error(), "secret")
				assert.NotContains(t, err.Error(), "12345")
				return
			}
			require.NoError(t, err)
			assert.Equal(t, now.Add(86399*time.Second), token.ExpiresOn)
			assert.Equal(t, 86399*time.Second, token.ExpiresIn)
			assert.Equal(t, token.ExpiresOn, token.ExtExpiresOn)
			assert.Equal(t, now, token.NotBefore)
			assert.Zero(t, token.RefreshOn)
		})
	}
	_, err := parseToken([]byte(`["secret"]`), key, now)
	require.EqualError(t, err, "malformed JSON: wrong type of value")
}

// A wrong clock may shorten the life of a token, and never prolongs it.
func TestExpiry(t *testing.T) {
	const h, m = time.Hour, time.Minute
	now := time.Now()
	for name, tc := range map[string]struct {
		on, in       time.Duration // from now, as the issuer says; 0 for nothing
		wantOn, life time.Duration // 0 for an error
	}{
		"both agree":                                {24 * h, 24 * h, 24 * h, 24 * h},
		"expires_on alone":                          {24 * h, 0, 24 * h, 24 * h},
		"expires_in alone":                          {0, 24 * h, 24 * h, 24 * h},
		"expires_on alone, expired":                 {-1 * m, 0, 0, 0},
		"a clock that is fast by 4 minutes":         {20 * m, 24 * m, 20 * m, 24 * m},
		"fast by 4 minutes, the token has 3 left":   {-1 * m, 3 * m, 3 * m, 3 * m},
		"fast by an hour":                           {23 * h, 24 * h, 23 * h, 23 * h},
		"fast by more than a day":                   {-1 * h, 24 * h, 0, 0},
		"an expired token with its first life":      {-1 * m, 24 * h, 0, 0},
		"a token near its end with its first life":  {10 * m, 24 * h, 10 * m, 10 * m},
		"a clock that is slow by 4 minutes":         {28 * m, 24 * m, 28 * m, 24 * m},
		"slow by an hour":                           {25 * h, 24 * h, 24 * h, 24 * h},
		"slow by an hour, the token has 1 min left": {61 * m, 1 * m, 1 * m, 1 * m},
		"slow by an hour, the token has expired":    {59 * m, -1 * m, 0, 0},
		"slow by ten years":                         {87600 * h, 24 * h, 0, 0},
		"a token for more than a week":              {169 * h, 169 * h, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var expiresOn, expiresIn seconds
			if tc.on != 0 {
				expiresOn = seconds{now.Add(tc.on).Unix(), true}
			}
			if tc.in != 0 {
				expiresIn = seconds{int64(tc.in / time.Second), true}
			}
			on, life, err := expiry(expiresOn, expiresIn, now)
			if tc.life == 0 {
				require.Error(t, err)
				return
			}
			require.NoError(t, err)
			assert.WithinDuration(t, now.Add(tc.wantOn), on, time.Second)
			assert.InDelta(t, tc.life, life, float64(time.Second))
		})
	}
}

func TestRefreshIn(t *testing.T) {
	now := time.Now()
	for text, want := range map[string]time.Duration{
		`"43200"`: 12 * time.Hour, "43200": 12 * time.Hour, `""`: 0, "null": 0, `"0"`: 0, `"-5"`: 0, `"86400"`: 0, `"9223372036854775807"`: 0,
	} {
		body := answerWith(map[string]any{"expires_on": nil, "expires_in": `"86400"`, "refresh_in": text})
		token, err := parseToken([]byte(body), key, now)
		require.NoError(t, err, text)
		if want == 0 {
			assert.Zero(t, token.RefreshOn, text)
			continue
		}
		assert.Equal(t, now.Add(want), token.RefreshOn)
		assert.Contains(t, token.RefreshOn.String(), "m=+", "it carries the monotonic clock")
	}
}

func TestOptionalTokenFields(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	token, err := parseToken([]byte(answerWith(map[string]any{"not_before": `"1699999700"`, "ext_expires_in": `"172800"`})), key, now)
	require.NoError(t, err)
	assert.Equal(t, now.Add(-5*time.Minute), token.NotBefore)
	assert.Equal(t, now.Add(48*time.Hour), token.ExtExpiresOn)
}

func FuzzParseToken(f *testing.F) {
	f.Add([]byte(answerWith(nil)))
	f.Add([]byte(answerWith(map[string]any{"refresh_in": "3600", "expires_on": 1_700_000_100})))
	f.Add([]byte(answerWith(map[string]any{"expires_in": `"60"`, "expires_on": `"1699999900"`})))
	f.Add([]byte(`{"access_token":"the-token-is-secret","resource":"the-token-is-secret","expires_in":-1}`))
	now := time.Unix(1_700_000_000, 0)
	f.Fuzz(func(t *testing.T, body []byte) {
		token, err := parseToken(body, key, now)
		if err != nil {
			if strings.Contains(err.Error(), "the-token") {
				t.Fatalf("quoted: %s", err)
			}
			return
		}
		last := token.ExpiresOn
		if token.AccessToken == "" || strings.ContainsAny(token.AccessToken, "\"\\\x00\n ") || token.TokenType == "" ||
			!sameResource(token.Resource, key.Resource) || !strings.EqualFold(token.ClientID, key.ClientID) ||
			!last.After(now) || last.Sub(now) > maxLifetime || token.ExtExpiresOn.Before(last) || token.ExtExpiresOn.Sub(now) > maxLifetime ||
			token.ExpiresIn < 0 || token.ExpiresIn > maxLifetime ||
			token.ExpiresIn > 0 && (token.ExpiresIn > last.Sub(now)+clockSkew || last.Sub(now) > token.ExpiresIn+clockSkew) ||
			!token.RefreshOn.IsZero() && (!token.RefreshOn.After(now) || !token.RefreshOn.Before(now.Add(min(maxLifetime, max(token.ExpiresIn, last.Sub(now)))))) {
			t.Fatalf("accepted %q", body)
		}
	})
}
