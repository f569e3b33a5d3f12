package imdstest

import (
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

type claims struct {
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	Serial   int    `json:"serial"`
}

// issued is a token that has been made.
type issued struct {
	token     string
	notBefore int64 // seconds since 1970, as the fields of an answer
	expiresOn int64
}

// Subject says whose token this is: the client ID of an identity, or Node. It
// returns "" for what is not a token of this package.
func Subject(token string) string {
	head, _, ok := strings.Cut(token, ".")
	if !ok {
		return ""
	}
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var claims claims
	if json.Unmarshal(raw, &claims) != nil {
		return ""
	}
	return claims.Subject
}

// tokenFields returns the fields of an answer: a new token, or one that was made
// before.
func (s *Server) tokenFields(subject, resource string, fresh bool) map[string]any {
	now := time.Now().Unix()
	t := s.issue(claims{Subject: subject, Audience: resource}, now, fresh)
	seconds := func(n int64) string { return strconv.FormatInt(n, 10) }
	return map[string]any{
		"access_token":   t.token,
		"client_id":      subject,
		"expires_in":     seconds(t.expiresOn - now),
		"expires_on":     seconds(t.expiresOn),
		"ext_expires_in": seconds(t.expiresOn - now),
		"not_before":     seconds(t.notBefore),
		"resource":       resource,
		"token_type":     "Bearer",
	}
}

func (s *Server) issue(c claims, now int64, fresh bool) issued {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.cache[c]; ok && !fresh && now < t.expiresOn {
		return t
	}
	s.issued++
	numbered := c
	numbered.Serial = s.issued
	head, err := json.Marshal(numbered)
	if err != nil {
		panic(err) // three plain fields
	}
	t := issued{
		token:     base64.RawURLEncoding.EncodeToString(head) + ".",
		notBefore: now,
		expiresOn: now + int64(s.cfg.Lifetime/time.Second),
	}
	if pad := s.cfg.TokenSize - len(t.token); pad > 0 {
		t.token += strings.Repeat("0", pad)
	}
	if s.cfg.Cached {
		s.cache[c] = t
	}
	return t
}
