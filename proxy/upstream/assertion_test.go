package upstream

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/podidentity/nmi/tokencache"
)

func byServiceAccount(p *tokencache.Principal) {
	p.SecretNamespace, p.SecretName = "", ""
	p.ServiceAccount = tokencache.ServiceAccount{Namespace: "shop", Name: "cart", UID: "u"}
}

// TestUnusableServiceAccountToken: nothing is sent to Entra, and no error quotes the token.
func TestUnusableServiceAccountToken(t *testing.T) {
	jwt := func(payload string) string {
		return "eyJhbGciOiJSUzI1NiJ9." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".c2ln"
	}
	for name, tc := range map[string]struct {
		token string
		err   error
		text  string
		class tokencache.Class
	}{
		"opaque":       {token: "s3cr3t~of.the-principal", text: "no JSON Web Token"},
		"not base64":   {token: "eyJ.!.eyJ", text: "malformed JSON Web Token"},
		"not JSON":     {token: jwt("p4ssword of the file"), text: "malformed JSON Web Token"},
		"odd claims":   {token: jwt(`{"iss":1}`), text: "malformed JSON Web Token"},
		"away":         {err: errors.New("connection refused"), text: "service account shop/cart: connection refused"},
		"refused":      {err: fmt.Errorf("%w: no role", ErrNoServiceAccountToken), text: "service account shop/cart: its token cannot be requested: no role", class: tokencache.Refused},
		"not a reader": {text: "this agent requests none", class: tokencache.Refused},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPrincipals(t, func(c *Config) {
				if name == "not a reader" {
					return
				}
				c.ServiceAccountToken = func(_ context.Context, account tokencache.ServiceAccount) (string, error) {
					assert.Equal(t, tokencache.ServiceAccount{Namespace: "shop", Name: "cart", UID: "u"}, account)
					return tc.token, tc.err
				}
			})
			err := p.fails(t, p.key(byServiceAccount))
			var credential *CredentialError
			require.ErrorAs(t, err, &credential)
			require.ErrorContains(t, err, tc.text)
			assert.Equal(t, tc.class, credential.Class())
			assert.Empty(t, p.entra.Calls())
			assert.Zero(t, p.reads)
		})
	}
}

func TestNoMatch(t *testing.T) {
	for description, want := range map[string]bool{
		"AADSTS70021: No matching federated identity record found for presented assertion.":          true,
		"AADSTS700211: No matching federated identity record found for presented assertion issuer.":  true,
		"AADSTS700213: No matching federated identity record found for presented assertion subject.": true,
		"AADSTS700218: The request body must contain the following parameter: 'client_assertion'.":   false,
		"AADSTS7000215: Invalid client secret provided.":                                             false,
		"": false,
	} {
		assert.Equal(t, want, (&AssertionError{Err: &Error{Description: description}}).NoMatch(), description)
	}
}

func TestTokenProxyRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		status     int
		body       string
		class      tokencache.Class
		code, text string
	}{
		"forbidden":        {403, `{"kind":"Status","message":"no right"}`, tokencache.Refused, "unauthorized_client", "refused: no right"},
		"unauthorized":     {401, `{"kind":"Status","message":"Unauthorized"}`, tokencache.Refused, "invalid_client", "refused: Unauthorized"},
		"a long message":   {403, `{"message":"` + strings.Repeat("ä", 300) + `"}`, tokencache.Refused, "unauthorized_client", "refused: " + strings.Repeat("ä", maxProxyMessage)},
		"no JSON":          {403, "<html>", tokencache.Refused, "unauthorized_client", "refused: Forbidden"},
		"nothing":          {403, "", tokencache.Refused, "unauthorized_client", "refused: Forbidden"},
		"out of order":     {503, `{"message":"x"}`, tokencache.Unavailable, "", ""},
		"in Entra's words": {403, `{"error":"invalid_client","error_description":"AADSTS700211: no"}`, tokencache.Refused, "invalid_client", "AADSTS700211: no"},
	} {
		x := &exchange{proxied: true, status: tc.status, body: []byte(tc.body)}
		e := x.refusal(time.Now())
		assert.Equal(t, tc.class, e.Class(), name)
		assert.Equal(t, tc.code, e.Code, name)
		assert.True(t, strings.HasSuffix(e.Description, tc.text), "%s: %s", name, e.Description)
	}
	x := &exchange{status: 403, body: []byte("<html>")}
	assert.Equal(t, tokencache.Unavailable, x.refusal(time.Now()).Class(), "of a proxy before Entra")
}
