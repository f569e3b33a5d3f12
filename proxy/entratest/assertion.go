package entratest

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"
)

const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// checkAssertion says what is wrong with a client assertion, "" if nothing is
// (RFC 7523, section 3; learn.microsoft.com, "Microsoft identity platform
// application authentication certificate credentials").
func checkAssertion(p Principal, assertion, kind, endpoint string) string {
	parts := strings.Split(assertion, ".")
	if len(parts) != 3 || kind != assertionType {
		return "it is not a signed JWT"
	}
	var header struct {
		Algorithm  string `json:"alg"`
		Thumbprint string `json:"x5t#S256"`
	}
	var claims struct {
		Issuer    string `json:"iss"`
		Subject   string `json:"sub"`
		Audience  string `json:"aud"`
		NotBefore int64  `json:"nbf"`
		Expires   int64  `json:"exp"`
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil || !decode(parts[0], &header) || !decode(parts[1], &claims) {
		return "it cannot be decoded"
	}
	if p.Certificate == nil {
		return "the application has no certificate"
	}
	key, ok := p.Certificate.PublicKey.(*rsa.PublicKey)
	if !ok || header.Algorithm != "PS256" {
		return "it is not signed with PS256"
	}
	// Microsoft's libraries write it in either of base64's alphabets.
	thumbprint := strings.TrimRight(strings.NewReplacer("+", "-", "/", "_").Replace(header.Thumbprint), "=")
	if of := sha256.Sum256(p.Certificate.Raw); thumbprint != base64.RawURLEncoding.EncodeToString(of[:]) {
		return "the key with this thumbprint is not registered"
	}
	digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	now := time.Now().Unix()
	switch {
	case rsa.VerifyPSS(key, crypto.SHA256, digest[:], signature, nil) != nil:
		return "its signature does not verify"
	case !strings.EqualFold(claims.Issuer, p.ClientID) || !strings.EqualFold(claims.Subject, p.ClientID):
		return "it speaks for another application"
	case claims.Audience != endpoint:
		return "it is for another audience"
	case now < claims.NotBefore-300 || now >= claims.Expires:
		return "it is not within its valid time range"
	}
	return ""
}

func decode(part string, into any) bool {
	raw, err := base64.RawURLEncoding.DecodeString(part)
	return err == nil && json.Unmarshal(raw, into) == nil
}
