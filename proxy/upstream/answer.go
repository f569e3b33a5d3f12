package upstream

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/podidentity/nmi/tokencache"
)

const (
	// maxLifetime is the longest plausible lifetime of a token. Managed identities get 24
	// hours, and up to 28 with continuous access evaluation.
	maxLifetime = 7 * 24 * time.Hour
	// clockSkew is how far clocks may differ: as far as Microsoft's libraries tolerate
	// when they validate a token (TokenValidationParameters.DefaultClockSkew).
	clockSkew = 5 * time.Minute
)

// seconds is a number of seconds, as a JSON number or a string: IMDS sends strings,
// emulations of it often numbers.
type seconds struct {
	n   int64
	set bool
}

func (s *seconds) UnmarshalJSON(b []byte) error {
	text := strings.Trim(string(b), `"`)
	if text == "" || text == "null" {
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil { // it quotes the text
		return errors.New("malformed number: want whole seconds")
	}
	s.n, s.set = n, true
	return nil
}

// duration returns the seconds as a duration; false if they are not set, not positive or
// above the limit.
func (s seconds) duration(limit time.Duration) (time.Duration, bool) {
	if s.n <= 0 || s.n > int64(limit/time.Second) {
		return 0, false
	}
	return time.Duration(s.n) * time.Second, true
}

// parseToken parses an answer that was received at now, and checks that it is for the key.
// Fields that clients depend on must be present or follow from others: the token, its type,
// expiry, client ID and resource. Errors quote nothing from the answer, since any part of it
// may contain the token.
func parseToken(body []byte, key tokencache.Key, now time.Time) (*tokencache.Token, error) {
	var in struct {
		AccessToken  string  `json:"access_token"`
		ClientID     string  `json:"client_id"`
		ExpiresIn    seconds `json:"expires_in"`
		ExpiresOn    seconds `json:"expires_on"`
		ExtExpiresIn seconds `json:"ext_expires_in"`
		NotBefore    seconds `json:"not_before"`
		RefreshIn    seconds `json:"refresh_in"`
		Resource     string  `json:"resource"`
		TokenType    string  `json:"token_type"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, explainJSON(err)
	}
	switch {
	case in.AccessToken == "":
		return nil, errors.New("no access_token")
	case !isBearerToken(in.AccessToken):
		return nil, errors.New("access_token has characters that no bearer token has (RFC 6750, section 2.1)")
	case in.TokenType == "":
		return nil, errors.New("no token_type")
	case !sameResource(in.Resource, key.Resource):
		return nil, fmt.Errorf("wrong resource: want %.200q", key.Resource)
	case in.ClientID == "":
		return nil, errors.New("no client_id")
	case key.ClientID != "" && !strings.EqualFold(in.ClientID, key.ClientID):
		return nil, fmt.Errorf("wrong client_id: want %q", key.ClientID)
	}
	expiresOn, lifetime, err := expiry(in.ExpiresOn, in.ExpiresIn, now)
	if err != nil {
		return nil, err
	}
	token := &tokencache.Token{
		AccessToken:  in.AccessToken,
		ClientID:     in.ClientID,
		Resource:     in.Resource,
		TokenType:    in.TokenType,
		NotBefore:    now,
		ExpiresOn:    expiresOn,
		ExtExpiresOn: expiresOn,
	}
	if in.ExpiresIn.set {
		token.ExpiresIn = lifetime
	}
	if in.NotBefore.set {
		token.NotBefore = time.Unix(in.NotBefore.n, 0)
	}
	if after, ok := in.RefreshIn.duration(lifetime - 1); ok {
		token.RefreshOn = now.Add(after)
	}
	if ext, ok := in.ExtExpiresIn.duration(maxLifetime); ok && now.Add(ext).After(expiresOn) {
		token.ExtExpiresOn = now.Add(ext)
	}
	return token, nil
}

// sameResource reports whether two spellings name the same resource. IMDS echoes the
// requested spelling, but services that stand in for it may return a canonical one, in
// another case or without the trailing slash.
func sameResource(a, b string) bool {
	return strings.EqualFold(strings.TrimRight(a, "/"), strings.TrimRight(b, "/")) && strings.Trim(a, "/") != ""
}

// maxSpellings bounds the lines in the log, since pods choose resources.
const maxSpellings = 20

// spellings logs, once for each, the resources that IMDS spells differently.
type spellings struct {
	logger *slog.Logger

	mu     sync.Mutex      // guards logged
	logged map[string]bool // by the requested resource
}

func (s *spellings) log(asked, answered string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.logged[asked] || len(s.logged) >= maxSpellings {
		return
	}
	s.logged[asked] = true
	s.logger.Info("IMDS spells a resource differently; its tokens are used", "asked", asked, "answered", answered)
}

// expiry returns when a token that was received at now expires, and its lifetime. The
// issuer computes both by its own clock: expires_in does not depend on the node's clock,
// and expires_on has to be compared with it. Either is enough.
//
// If they agree within clockSkew, expires_in counts: a node whose clock is fast by minutes
// must not refuse a token that has minutes left. If they do not, either the node's clock is
// wrong, or the issuer has sent an outdated expires_in with a token from its cache. Nothing
// tells which, so the earlier expiry counts: an expired token is never taken for a valid
// one, and a wrong clock costs no more than an early refresh.
func expiry(expiresOn, expiresIn seconds, now time.Time) (on time.Time, lifetime time.Duration, err error) {
	lifetime, ok := expiresIn.duration(maxLifetime)
	if expiresIn.set && !ok {
		return time.Time{}, 0, fmt.Errorf("implausible expires_in %d", expiresIn.n)
	}
	if !expiresOn.set {
		if !expiresIn.set {
			return time.Time{}, 0, errors.New("neither expires_on nor expires_in")
		}
		return now.Add(lifetime), lifetime, nil
	}
	on = time.Unix(expiresOn.n, 0)
	left := on.Sub(now)
	switch {
	case !expiresIn.set, left < lifetime-clockSkew:
		lifetime = left
	case left > lifetime+clockSkew, left <= 0:
		on = now.Add(lifetime)
	}
	if lifetime <= 0 || left > maxLifetime || expiresOn.n <= 0 {
		return time.Time{}, 0, fmt.Errorf("implausible token expiry %s; check the node's clock", on.UTC().Format(time.RFC3339))
	}
	return on, lifetime, nil
}

// explainJSON explains a json error without quoting the answer.
func explainJSON(err error) error {
	var kind *json.UnmarshalTypeError
	if errors.As(err, &kind) {
		return fmt.Errorf("malformed JSON: wrong type of %s", cmp.Or(kind.Field, "value"))
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("malformed JSON at byte %d", syntax.Offset)
	}
	return fmt.Errorf("malformed JSON: %w", err)
}

// isBearerToken reports whether a token can be sent in an Authorization header (RFC 6750,
// section 2.1, b64token).
func isBearerToken(token string) bool {
	for i := range len(token) {
		switch c := token[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~+/=", c) >= 0:
		default:
			return false
		}
	}
	return true
}
