package tokencache

import "time"

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
