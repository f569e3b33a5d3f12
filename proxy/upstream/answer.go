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
	// longestLife is the longest token life that is believed. Managed
	// identities get 24 hours, with continuous access evaluation up to 28.
	longestLife = 7 * 24 * time.Hour
	// clockSkew is how wrong a clock may be before it is not believed: as much as
	// Microsoft's own libraries forgive when they check a token
	// (TokenValidationParameters.DefaultClockSkew).
	clockSkew = 5 * time.Minute
)

// seconds reads a number of seconds that may be written as a JSON number or as
// a string: IMDS sends strings, its emulations often numbers.
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
	if err != nil { // which quotes the text
		return errors.New("a time is not a whole number of seconds")
	}
	s.n, s.set = n, true
	return nil
}

// within returns the number as a duration, and false if it is not set, not positive
// or longer than a token lives.
func (s seconds) within(limit time.Duration) (time.Duration, bool) {
	if s.n <= 0 || s.n > int64(limit/time.Second) {
		return 0, false
	}
	return time.Duration(s.n) * time.Second, true
}

// parseToken reads an answer that was received at now, and checks that it is
// what was asked for. What clients break without must be there or follow from what
// is: the token, its type, its end, and whose it is and what for. Errors quote no text
// of the answer, since the token may be in any of it.
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
		return nil, notJSON(err)
	}
	switch {
	case in.AccessToken == "":
		return nil, errors.New("no access_token")
	case !isB64Token(in.AccessToken):
		return nil, errors.New("access_token has characters that no bearer token has (RFC 6750)")
	case in.TokenType == "":
		return nil, errors.New("no token_type")
	case !sameResource(in.Resource, key.Resource):
		return nil, fmt.Errorf("it is for another resource than the one asked for, %.200q", key.Resource)
	case in.ClientID == "":
		return nil, errors.New("no client_id")
	case key.ClientID != "" && !strings.EqualFold(in.ClientID, key.ClientID):
		return nil, fmt.Errorf("it is for another client_id than the one asked for, %q", key.ClientID)
	}
	on, life, err := expiry(in.ExpiresOn, in.ExpiresIn, now)
	if err != nil {
		return nil, err
	}
	token := &tokencache.Token{
		AccessToken:  in.AccessToken,
		ClientID:     in.ClientID,
		Resource:     in.Resource,
		TokenType:    in.TokenType,
		NotBefore:    now,
		ExpiresOn:    on,
		ExtExpiresOn: on,
	}
	if in.ExpiresIn.set {
		token.ExpiresIn = life
	}
	if in.NotBefore.set {
		token.NotBefore = time.Unix(in.NotBefore.n, 0)
	}
	if after, ok := in.RefreshIn.within(life - 1); ok {
		token.RefreshOn = now.Add(after)
	}
	if ext, ok := in.ExtExpiresIn.within(longestLife); ok && now.Add(ext).After(on) {
		token.ExtExpiresOn = now.Add(ext)
	}
	return token, nil
}

// sameResource reports whether two spellings name one resource. IMDS echoes the one that
// it was asked for, and what stands in for it may have a canonical one: in other case, or
// without the slash at the end.
func sameResource(a, b string) bool {
	return strings.EqualFold(strings.TrimRight(a, "/"), strings.TrimRight(b, "/")) && strings.Trim(a, "/") != ""
}

// maxSpellings bounds the lines of spellings, since pods choose resources.
const maxSpellings = 20

// spellings logs each resource once that is answered with another spelling of it.
type spellings struct {
	to *slog.Logger

	mu   sync.Mutex      // guards told
	told map[string]bool // by the resource asked for
}

func (s *spellings) log(asked, answered string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.told[asked] || len(s.told) >= maxSpellings {
		return
	}
	s.told[asked] = true
	s.to.Info("IMDS spells a resource differently; its tokens are used", "asked", asked, "answered", answered)
}

// expiry decides when a token that came at now ends, and how long it lives. The
// issuer counts both by its own clock: expires_in is a number that the node's clock
// has no part in, expires_on one that it has to be compared with. Either is enough.
//
// Where they agree, but for what a clock may be wrong, the token lives as long as
// expires_in says: a node whose clock is fast by minutes must not refuse a token that
// has minutes left. Where they do not, either the node's clock is wrong or the issuer
// has sent an old expires_in with a token from a cache of its own. Nothing tells
// which, so the earlier end counts: an expired token is never taken for a valid one,
// and all that a wrong clock costs is a refresh that comes early.
func expiry(expiresOn, expiresIn seconds, now time.Time) (on time.Time, life time.Duration, err error) {
	life, ok := expiresIn.within(longestLife)
	if expiresIn.set && !ok {
		return time.Time{}, 0, fmt.Errorf("expires_in is %d s, which cannot be", expiresIn.n)
	}
	if !expiresOn.set {
		if !expiresIn.set {
			return time.Time{}, 0, errors.New("neither expires_on nor expires_in")
		}
		return now.Add(life), life, nil
	}
	on = time.Unix(expiresOn.n, 0)
	left := on.Sub(now)
	switch {
	case !expiresIn.set, left < life-clockSkew:
		life = left
	case left > life+clockSkew, left <= 0:
		on = now.Add(life)
	}
	if life <= 0 || left > longestLife || expiresOn.n <= 0 {
		return time.Time{}, 0, fmt.Errorf("it expires at %s, which cannot be; check the node's clock", on.UTC().Format(time.RFC3339))
	}
	return on, life, nil
}

// notJSON says what kind of mistake it was, and quotes nothing.
func notJSON(err error) error {
	var kind *json.UnmarshalTypeError
	if errors.As(err, &kind) {
		return fmt.Errorf("not the JSON of a token: the wrong type of %s", cmp.Or(kind.Field, "value"))
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("not the JSON of a token: wrong at byte %d", syntax.Offset)
	}
	return fmt.Errorf("not the JSON of a token: %w", err)
}

// isB64Token reports whether a token can stand in an Authorization header.
func isB64Token(token string) bool {
	for i := range len(token) {
		switch c := token[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~+/=", c) >= 0:
		default:
			return false
		}
	}
	return true
}
