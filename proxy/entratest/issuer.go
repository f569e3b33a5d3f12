package entratest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// FederatedCredential is whose tokens prove a principal: those with these three claims
// (learn.microsoft.com, "Overview of federated identity credentials").
type FederatedCredential struct{ Issuer, Subject, Audience string }

// Issuer signs tokens of service accounts, as a cluster's API server does.
type Issuer struct {
	URL string
	key *rsa.PrivateKey
}

// NewIssuer returns an Issuer with a key of its own. It panics if it cannot.
func NewIssuer(url string) *Issuer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return &Issuer{url, key}
}

// Key is what its tokens are checked with.
func (i *Issuer) Key() *rsa.PublicKey { return &i.key.PublicKey }

// Subject is the subject of a service account's tokens.
func Subject(namespace, name string) string {
	return "system:serviceaccount:" + namespace + ":" + name
}

// Token signs a token.
func (i *Issuer) Token(subject, audience string, notBefore time.Time, life time.Duration) string {
	part := func(value any) string {
		text, err := json.Marshal(value)
		if err != nil {
			panic(err) // plain fields
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	signed := part(map[string]string{"alg": "RS256", "kid": "1"}) + "." + part(map[string]any{
		"iss": i.URL, "sub": subject, "aud": []string{audience}, "nbf": notBefore.Unix(), "iat": notBefore.Unix(), "exp": notBefore.Add(life).Unix(),
	})
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, digest[:])
	if err != nil {
		panic(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// checkFederated returns the number and the text of Entra's error for the token of a service account;
// 0 if it proves the principal.
func (s *Server) checkFederated(p Principal, assertion, kind string) (number int, text string) {
	parts := strings.Split(assertion, ".")
	var claims struct {
		Issuer    string   `json:"iss"`
		Subject   string   `json:"sub"`
		Audience  []string `json:"aud"`
		NotBefore int64    `json:"nbf"`
		Expires   int64    `json:"exp"`
	}
	if len(parts) != 3 || kind != assertionType || !decode(parts[1], &claims) || len(claims.Audience) != 1 {
		return 50027, "JWT token is invalid or malformed."
	}
	got := FederatedCredential{claims.Issuer, claims.Subject, claims.Audience[0]}
	matches := func(same func(FederatedCredential) bool) bool { return slices.ContainsFunc(p.Federated, same) }
	switch {
	case len(p.Federated) == 0:
		return 70021, "No matching federated identity record found for presented assertion. Assertion Issuer: '" + got.Issuer +
			"'. Assertion Subject: '" + got.Subject + "'. Assertion Audience: '" + got.Audience + "'."
	case !matches(func(c FederatedCredential) bool { return c.Issuer == got.Issuer }):
		return 700211, "No matching federated identity record found for presented assertion issuer '" + got.Issuer + "'."
	case !matches(func(c FederatedCredential) bool { return c.Issuer == got.Issuer && c.Audience == got.Audience }):
		return 700212, "No matching federated identity record found for presented assertion audience '" + got.Audience + "'."
	case !matches(func(c FederatedCredential) bool { return c == got }):
		return 700213, "No matching federated identity record found for presented assertion subject '" + got.Subject + "'."
	}
	s.mu.Lock()
	key := s.cfg.Issuers[got.Issuer]
	s.mu.Unlock()
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	now := time.Now().Unix()
	switch {
	case key == nil || err != nil || rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) != nil:
		return 700027, "Client assertion failed signature validation."
	case now < claims.NotBefore-300 || now >= claims.Expires:
		return 700024, "Client assertion is not within its valid time range."
	}
	return 0, ""
}
