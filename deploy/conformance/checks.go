package conformance

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// conversation is one case at work.
type conversation struct {
	Target
	ctx      context.Context // of the run
	failures []string
	errors   []answer // heard in this run so far, by all cases
	resource int      // ever made up
}

// wrong notes a failure. Its text must be the same in each run.
func (c *conversation) wrong(format string, args ...any) {
	c.failures = append(c.failures, fmt.Sprintf(format, args...))
}

// bodyLimit is how much of a body a report quotes.
const bodyLimit = 120

// seen says what came, for reports.
func (a answer) seen() string {
	if a.status == 0 {
		return a.problem
	}
	body := string(a.body)
	if strings.Contains(body, "access_token") {
		return fmt.Sprintf("%d and a token", a.status)
	}
	if len(body) > bodyLimit {
		body = body[:bodyLimit] + "…"
	}
	return fmt.Sprintf("%d %s", a.status, strings.TrimSpace(body))
}

// is notes a failure unless the answer has one of the statuses.
func (c *conversation) is(a answer, statuses ...int) bool {
	var words []string
	for _, status := range statuses {
		if a.status == status {
			return true
		}
		words = append(words, strconv.Itoa(status))
	}
	c.wrong("%s: %s, expected %s", a.to, a.seen(), strings.Join(words, " or "))
	return false
}

// says notes a failure unless status and body are these, to the letter.
func (c *conversation) says(a answer, status int, body string) {
	if c.is(a, status) && string(a.body) != body {
		c.wrong("%s: %s, expected %s", a.to, a.seen(), body)
	}
}

// soon notes a failure if the answer comes too late for an SDK's probe each time: a
// machine that is busy with other things may be late once, or twice.
func (c *conversation) soon(from Caller, a answer) {
	for tries := 1; tries < 3 && a.took > probePatience; tries++ {
		a = c.send(from, a.to)
	}
	if a.took > probePatience {
		c.wrong("%s: answered after more than %s", a.to, probePatience)
	}
}

// withoutToken notes a failure if there is a token in the answer.
func (c *conversation) withoutToken(a answer) {
	if bytes.Contains(a.body, []byte("access_token")) {
		c.wrong("%s: %s, expected none", a.to, a.seen())
	}
}

// token reads the fields of a token, or notes why it cannot.
func (c *conversation) token(a answer) (fields map[string]any, ok bool) {
	if !c.is(a, 200) {
		return nil, false
	}
	if err := json.Unmarshal(a.body, &fields); err != nil {
		c.wrong("%s: 200 without JSON, expected a token", a.to)
		return nil, false
	}
	if text, _ := fields["access_token"].(string); text == "" {
		c.wrong("%s: no access_token", a.to)
		return nil, false
	}
	return fields, true
}

// own notes a failure unless the answer is a token of the caller's identity, and
// returns the token.
func (c *conversation) own(a answer) string { return c.tokenOf(a, c.ClientID) }

// tokenOf notes a failure unless the answer is a token of the identity with this
// client ID, by the body's word and by the token's own; "" is any. It returns the
// token.
func (c *conversation) tokenOf(a answer, clientID string) string {
	fields, ok := c.token(a)
	if !ok {
		return ""
	}
	token, _ := fields["access_token"].(string)
	if clientID != "" {
		if echoed, _ := fields["client_id"].(string); !strings.EqualFold(echoed, clientID) {
			c.wrong("%s: client_id %q, expected %q", a.to, echoed, clientID)
		}
		if subject := c.Subject(token); subject != "" && !strings.EqualFold(subject, clientID) {
			c.wrong("%s: a token of %q, expected one of %q", a.to, subject, clientID)
		}
	}
	return token
}

// refusal reads an error of the identity endpoint, or notes why it cannot.
func (c *conversation) refusal(a answer, status int) (code, description string) {
	var in struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	if !c.is(a, status) {
		return "", ""
	}
	if err := json.Unmarshal(a.body, &in); err != nil || in.Error == "" {
		c.wrong("%s: %s, expected an error in JSON", a.to, a.seen())
	}
	return in.Error, in.Description
}

// comesBack notes a failure unless the answer says in whole seconds when to ask
// again, and returns that.
func (c *conversation) comesBack(a answer) time.Duration {
	value := a.header.Get("Retry-After")
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 {
		c.wrong("%s: %d with Retry-After %q, expected seconds", a.to, a.status, value)
		return time.Second
	}
	return time.Duration(n) * time.Second
}

// R returns a valid request for a token of the Target's resource, with more
// parameters, each of them encoded already.
func (c *conversation) R(parameters ...string) request {
	return c.forResource(url.QueryEscape(c.Resource), parameters...)
}

// forResource is R for a resource, as it stands in a query.
func (c *conversation) forResource(resource string, parameters ...string) request {
	r := get(tokenPath+"?"+c.query(resource, parameters...), metadata)
	r.label = strings.Join(append([]string{"R"}, parameters...), "&")
	return r
}

// forNew is R for a resource that no cache can know.
func (c *conversation) forNew(parameters ...string) request {
	return c.forResource(c.unused(), parameters...)
}

func (c *conversation) query(resource string, parameters ...string) string {
	all := append([]string{"api-version=2018-02-01", "resource=" + resource}, parameters...)
	if c.NameIdentity && !strings.Contains(strings.Join(parameters, "&"), "_id=") {
		all = append(all, "client_id="+c.ClientID)
	}
	return strings.Join(all, "&")
}

// unused makes up a resource that no cache can know.
func (c *conversation) unused() string {
	c.resource++
	return fmt.Sprintf("https://%d-%d.conformance.example", time.Now().UnixNano(), c.resource)
}

// appID reads the claim appid of a JWT, without believing or checking any of it.
func appID(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		AppID string `json:"appid"`
	}
	_ = json.Unmarshal(raw, &claims) // then there is none
	return claims.AppID
}
