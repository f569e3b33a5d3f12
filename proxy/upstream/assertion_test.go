package upstream

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"testing"

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
