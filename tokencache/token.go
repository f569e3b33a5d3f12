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

// freshness says what may be done with a stored token at a given moment.
type freshness int

const (
	expired freshness = iota // never served
	due                      // served, and refreshed behind the caller's back
	fresh                    // served
)

// entry is a stored token and the moment from which it is due.
type entry struct {
	token     *Token
	refreshAt time.Time
}

const (
	// longLived separates tokens that are refreshed half-way (managed
	// identities get 24 hours) from those refreshed shortly before the end.
	longLived = 2 * time.Hour
	// lastMinutes is how long before its end a short-lived token is refreshed:
	// the Azure SDKs themselves start to ask again at that point.
	lastMinutes = 5 * time.Minute
	// pause is the least time between two refreshes of one key, so that a
	// token which comes back close to its end, or an upstream which fails,
	// does not turn every request into an upstream call.
	pause = 30 * time.Second
)

// newEntry stores token as received at now.
func newEntry(token *Token, now time.Time) entry {
	at := token.ExpiresOn.Add(-lastMinutes)
	if life := token.ExpiresOn.Sub(now); life > longLived {
		at = now.Add(life / 2)
	}
	if soonest := now.Add(pause); at.Before(soonest) {
		at = soonest
	}
	return entry{token: token, refreshAt: at}
}

// freshness is a pure function of the entry and the time.
func (e entry) freshness(now time.Time) freshness {
	switch {
	case !now.Before(e.token.ExpiresOn):
		return expired
	case !now.Before(e.refreshAt):
		return due
	default:
		return fresh
	}
}

// postponed is the same token, due again after a pause.
func (e entry) postponed(now time.Time) entry {
	e.refreshAt = now.Add(pause)
	return e
}
