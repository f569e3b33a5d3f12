package upstream

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/podidentity/nmi/tokencache"
)

// ErrNoServiceAccountToken is wrapped by errors of Config.ServiceAccountToken that a retry does not
// change: the agent may not request it, or the service account does not exist.
var ErrNoServiceAccountToken = errors.New("its token cannot be requested")

// assertion is the token of a service account, with which a federated identity proves itself
// (RFC 7523, section 2.2), and of its claims those that Entra compares with the identity's federated
// credentials (learn.microsoft.com, "Workload identity federation").
type assertion struct {
	token                     string // a secret
	issuer, subject, audience string
}

// assertion requests the token of a service account.
func (e *entra) assertion(ctx context.Context, account tokencache.ServiceAccount) (*assertion, error) {
	token, err := e.accountToken(ctx, account)
	if err != nil {
		return nil, err
	}
	a := &assertion{token: token}
	var claims struct {
		Issuer   string   `json:"iss"`
		Subject  string   `json:"sub"`
		Audience []string `json:"aud"` // Kubernetes always writes a list
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("the API server's response has no JSON Web Token")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil { // which would quote it
		return nil, errors.New("the API server's response has a malformed JSON Web Token")
	}
	a.issuer, a.subject, a.audience = claims.Issuer, claims.Subject, strings.Join(claims.Audience, ",")
	return a, nil
}

// explain adds the claims to Entra's answer; a nil assertion adds none.
func (a *assertion) explain(err error) error {
	var answer *Error
	if a == nil || !errors.As(err, &answer) {
		return err
	}
	return &AssertionError{Issuer: a.issuer, Subject: a.subject, Audience: a.audience, Err: answer}
}

// AssertionError is Entra's answer to a federated identity. Its text begins with the claims that have
// to be those of a federated credential, because texts may be cut.
type AssertionError struct {
	Issuer, Subject, Audience string // of the service account's token
	Err                       *Error
}

func (e *AssertionError) Error() string {
	return fmt.Sprintf("for the token with subject %q, issuer %q and audience %q %v", e.Subject, e.Issuer, e.Audience, e.Err)
}

// Unwrap returns Err.
func (e *AssertionError) Unwrap() error { return e.Err }

// NoMatch reports whether the identity has no federated credential with these claims: AADSTS70021,
// or 700211 to 700213 of the issuer, the audience and the subject (learn.microsoft.com, "Microsoft
// Entra authentication and authorization error codes").
func (e *AssertionError) NoMatch() bool {
	code, _, _ := strings.Cut(e.Err.Description, ":")
	return slices.Contains([]string{"AADSTS70021", "AADSTS700211", "AADSTS700212", "AADSTS700213"}, code)
}
