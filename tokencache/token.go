package tokencache

import (
	"fmt"
	"io"
	"time"
)

// Token is an access token and what its issuer said about it. Tokens are shared
// between callers and must not be changed.
type Token struct {
	// AccessToken is a secret, never logged. It is a b64token (RFC 6750, section
	// 2.1), as it has to be in an Authorization header: letters, digits and
	// "-._~+/=" alone.
	AccessToken string
	ClientID    string // as the issuer spelled it
	Resource    string // as the issuer echoed it
	TokenType   string // "Bearer"

	NotBefore time.Time
	ExpiresOn time.Time
	// ExpiresIn is the lifetime as the issuer counted it when it answered, which a
	// node's wrong clock has no part in; 0 if the issuer did not say.
	ExpiresIn time.Duration
	// RefreshOn is when the issuer wants to be asked again; zero if it did not say.
	RefreshOn time.Time
	// ExtExpiresOn is the end of the extended lifetime that Entra grants during
	// an outage of its own; the same as ExpiresOn where it grants none.
	ExtExpiresOn time.Time
}

// String names the token without giving it away.
func (t Token) String() string {
	return fmt.Sprintf("token of client %q for %q until %s", t.ClientID, t.Resource, t.ExpiresOn.UTC().Format(time.RFC3339))
}

// Format implements fmt.Formatter: all verbs print String.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// MarshalText implements encoding.TextMarshaler, for encoders such as JSON's and slog's.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }
