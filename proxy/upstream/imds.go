package upstream

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"

	"github.com/podidentity/nmi/tokencache"
)

const (
	tokenPath  = "/metadata/identity/oauth2/token"
	apiVersion = "2018-02-01"

	// maxAnswer bounds what is read of an answer. Entra's tokens stay under
	// 20 KB even with hundreds of groups.
	maxAnswer = 1 << 20
	// longestLife is the longest token life that is believed. Managed
	// identities get 24 hours, with continuous access evaluation up to 28.
	longestLife = 7 * 24 * time.Hour
)

// Token fetches one token; the signature is tokencache.Fetch. ctx bounds the
// call and all its retries. A refusal by IMDS or Entra is an *Error.
func (u *Upstream) Token(ctx context.Context, ask tokencache.Request) (*tokencache.Token, error) {
	key := ask.Key
	if principal, ok := key.ServicePrincipal(); ok {
		return u.entra.fetch(ctx, key, principal)
	}
	req, err := runtime.NewRequest(ctx, http.MethodGet, u.base.JoinPath(tokenPath).String())
	if err != nil {
		return nil, fmt.Errorf("request for IMDS: %w", err)
	}
	query := url.Values{"api-version": {apiVersion}, "resource": {key.Resource}}
	switch {
	case key.ClientID != "":
		query.Set("client_id", key.ClientID)
	case key.ResourceID != "":
		query.Set("msi_res_id", key.ResourceID)
	default:
		// IMDS would answer with the node's own identity.
		return nil, fmt.Errorf("token key names no identity: %s", key)
	}
	req.Raw().URL.RawQuery = query.Encode()
	req.Raw().Header.Set("Metadata", "true")
	runtime.SkipBodyDownload(req) // azcore would read all of it, however long
	req.Raw().Header.Set("User-Agent", u.userAgent)

	resp, err := u.pipeline.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking IMDS for a token: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading IMDS's answer: %w", err)
	}
	now := time.Now()
	if resp.StatusCode != http.StatusOK {
		return nil, newError(resp.StatusCode, resp.Header.Get("Retry-After"), body, now)
	}
	token, err := parseToken(body, key, now)
	if err != nil {
		return nil, fmt.Errorf("IMDS's answer cannot be used: %w", err)
	}
	return token, nil
}

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
	if err != nil {
		return fmt.Errorf("%.40q is not a whole number of seconds", text)
	}
	s.n, s.set = n, true
	return nil
}

// parseToken reads an answer that was received at now, and checks that it is
// what was asked for. Its errors never quote the token.
func parseToken(body []byte, key tokencache.Key, now time.Time) (*tokencache.Token, error) {
	var in struct {
		AccessToken  string  `json:"access_token"`
		ClientID     string  `json:"client_id"`
		ExpiresIn    seconds `json:"expires_in"`
		ExpiresOn    seconds `json:"expires_on"`
		ExtExpiresIn seconds `json:"ext_expires_in"`
		NotBefore    seconds `json:"not_before"`
		Resource     string  `json:"resource"`
		TokenType    string  `json:"token_type"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, fmt.Errorf("not the JSON of a token: %w", err)
	}
	token := &tokencache.Token{
		AccessToken: in.AccessToken,
		ClientID:    in.ClientID,
		Resource:    in.Resource,
		TokenType:   in.TokenType,
		NotBefore:   now,
	}
	switch {
	case in.AccessToken == "":
		return nil, fmt.Errorf("no access_token")
	case !isB64Token(in.AccessToken):
		return nil, fmt.Errorf("access_token has characters that no bearer token has (RFC 6750)")
	case in.TokenType == "":
		return nil, fmt.Errorf("no token_type")
	case in.Resource != key.Resource:
		return nil, fmt.Errorf("it is for resource %.200q, asked for was %.200q", in.Resource, key.Resource)
	case key.ClientID != "" && !strings.EqualFold(in.ClientID, key.ClientID):
		return nil, fmt.Errorf("it is for client_id %.60q, asked for was %q", in.ClientID, key.ClientID)
	case in.ExpiresOn.set:
		token.ExpiresOn = time.Unix(in.ExpiresOn.n, 0)
	case in.ExpiresIn.set:
		token.ExpiresOn = now.Add(time.Duration(min(in.ExpiresIn.n, int64(longestLife/time.Second)+1)) * time.Second)
	default:
		return nil, fmt.Errorf("neither expires_on nor expires_in")
	}
	if life := token.ExpiresOn.Sub(now); life <= 0 || life > longestLife {
		return nil, fmt.Errorf("it expires at %s, which cannot be; check the node's clock", token.ExpiresOn.UTC().Format(time.RFC3339))
	}
	if in.NotBefore.set {
		token.NotBefore = time.Unix(in.NotBefore.n, 0)
	}
	token.ExtExpiresOn = token.ExpiresOn
	if ext := in.ExtExpiresIn; ext.set && ext.n > 0 && ext.n < int64(longestLife/time.Second) {
		if on := now.Add(time.Duration(ext.n) * time.Second); on.After(token.ExpiresOn) {
			token.ExtExpiresOn = on
		}
	}
	return token, nil
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
