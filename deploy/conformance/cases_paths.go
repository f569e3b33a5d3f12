package conformance

import (
	"encoding/json"
	"net/url"
	"strings"
)

// pathCases are about the ways to write the token path.
var pathCases = []Case{
	{
		Number: 35, Name: "another method: 405, no token", Mark: Policy, Source: tokenPage + " knows GET alone",
		Sends: "R as POST, PUT, DELETE",
		check: func(c *conversation) {
			for _, method := range []string{"POST", "PUT", "DELETE"} {
				r := c.R()
				r.method, r.label = method, "R as "+method
				a := c.ask(r)
				c.is(a, 405)
				c.withoutToken(a)
			}
		},
	},
	{
		Number: 36, Name: "/METADATA/identity/oauth2/token", Mark: Policy, Source: "the old NMI's route took it, as IMDS does",
		Sends: "R with the first segment in upper case",
		check: func(c *conversation) { c.own(c.ask(c.spelled("/METADATA/identity/oauth2/token"))) },
	},
	{
		Number: 37, Name: "odd spellings are never passed through", Mark: Policy, Source: "CVE-2022-23551: IMDS forgives spellings, a filter before it must not",
		Sends: "R in each of the spellings, from a caller with an identity and from one without", Needs: []Need{UnboundPod, SeenUpstream}, check: oddSpellings,
	},
	{
		Number: 38, Name: "//metadata/identity/oauth2/token, without a 301", Mark: SDK, Source: "MSAL4J sends it", Sends: "R with two slashes",
		check: func(c *conversation) { c.own(c.ask(c.spelled("//metadata/identity/oauth2/token"))) },
	},
	{
		Number: 39, Name: "an absolute-form URI, another Host: the same decision", Mark: Policy, Source: "RFC 9112, 3.2.2: servers accept the form; no name in it is an authority",
		Sends: "R and R with an unknown client_id, in absolute form to two hosts, and with another Host", check: absoluteForm,
	},
}

// spelled is R with the path written so.
func (c *conversation) spelled(path string) request {
	r := c.R()
	r.target, r.label = strings.Replace(r.target, tokenPath, path, 1), ""
	return r
}

// spellings are ways to write the token path, or what somebody who forgives could
// take for it.
var spellings = []string{
	`/metadata\identity\oauth2\token`, `\metadata\identity\oauth2\token`, `/metadata/identity\oauth2/token`,
	"/metadata%5cidentity%5coauth2%5ctoken", "/metadata%5Cidentity/oauth2/token", "/metadata%2fidentity%2foauth2%2ftoken",
	"/metadata%2Fidentity/oauth2/token", "/metadata%252fidentity%252foauth2%252ftoken", "/metadata%255cidentity/oauth2/token",
	"///metadata/identity/oauth2/token", "/metadata//identity/oauth2/token", "/metadata/identity//oauth2/token", "/metadata/identity/oauth2//token",
	"/./metadata/identity/oauth2/token", "/metadata/./identity/oauth2/token", "/metadata/identity/x/../oauth2/token",
	"/metadata/instance/../identity/oauth2/token", "/metadata/instance/%2e%2e/identity/oauth2/token", "/metadata/instance/..%2fidentity/oauth2/token",
	`/metadata/instance/..\identity\oauth2\token`, "/metadata/versions/../identity/oauth2/token",
	"/metadata;x/identity/oauth2/token", "/metadata/identity;x=1/oauth2/token", "/metadata/identity/oauth2/token;x",
	"/metadata/identity/oauth2/tok%65n", "/%6detadata/identity/oauth2/token", "/metadata/%69dentity/oauth2/token",
	"/metadata/Identity/oauth2/token", "/metadata/identity/OAuth2/token", "/metadata/identity/oauth2/TOKEN",
	"/metadata/identity/oauth2/tokenfoo", "/metadata/identity/oauth2/token//", "/metadata/identity/oauth2/token/x", "/metadata/identity/oauth2/token.json",
	"/metadata/identity/oauth2/token%00", "/metadata/identity/oauth2/token%20", "/metadata/identity/oauth2/token%0a", "/metadata/identity/oauth2/token%3f",
}

// brokenSpellings are such that no HTTP client sends.
var brokenSpellings = []string{
	"metadata/identity/oauth2/token", "/metadata/identity/oauth2/token\x00", "/metadata/identity/oauth2/\x80token",
	"/metadata/identity/oauth2/token%zz", "/metadata/identity/oauth2/ token", "/metadata/identity/oauth2/token#x", "/metadata/\tidentity/oauth2/token",
}

func oddSpellings(c *conversation) {
	stranger, err := c.Stage.Unbound(c.ctx)
	if err != nil {
		c.wrong("no caller without identity: %v", err)
		return
	}
	before := len(c.Stage.Upstream())
	try := func(from Caller, spelling string, send func(Caller, request) answer) {
		a := send(from, c.spelled(spelling))
		if from.ClientID == "" {
			c.withoutToken(a)
		} else if a.status == 200 {
			c.own(a)
		}
	}
	for _, from := range []Caller{stranger, c.Caller} {
		for _, spelling := range spellings {
			try(from, spelling, c.askFrom)
		}
		for _, spelling := range brokenSpellings {
			try(from, spelling, c.malformed)
		}
	}
	for _, target := range c.Stage.Upstream()[before:] {
		// The agent's own requests are spelled well, and name an identity.
		if path, query, _ := strings.Cut(target, "?"); path != tokenPath || !strings.Contains(query, "_id=") {
			c.wrong("%q was passed through", target)
		}
	}
}

func absoluteForm(c *conversation) {
	spell := func(r request, prefix, host string) request {
		r.target, r.host, r.label = prefix+r.target, host, r.label+" in "+prefix+"…, Host: "+or(host, "as ever")
		return r
	}
	for _, form := range [][2]string{
		{"http://169.254.169.254", ""}, {"http://elsewhere.example", "elsewhere.example"}, {"HTTP://elsewhere.example:8080", ""}, {"", "elsewhere.example"},
	} {
		c.own(c.ask(spell(c.R(), form[0], form[1])))
		a := c.ask(spell(c.R("client_id="+nobody), form[0], form[1]))
		c.says(a, 400, notFound)
	}
}

// otherPathCases are about all that is not the token path.
var otherPathCases = []Case{
	{
		Number: 40, Name: "getplatformmetadata and issuecredential: 404", Mark: Policy,
		Source: "MSAL.NET takes 400 for a service that issues certificates, which pods must not have",
		Sends:  "GET of the one, POST of the other, with and without the header",
		check: func(c *conversation) {
			for _, headers := range [][]string{nil, {metadata}} {
				c.is(c.ask(get("/metadata/identity/getplatformmetadata?cred-api-version=2.0", headers...)), 404)
				c.is(c.ask(request{method: "POST", target: "/metadata/identity/issuecredential?cred-api-version=2.0", headers: headers, body: `{"csr":"x"}`}), 404)
			}
		},
	},
	{
		Number: 41, Name: "identity/info does not say the node's tenant", Mark: Policy, Source: "it is the node's, not the pod's",
		Sends: "GET of /metadata/identity/info, with the header",
		check: func(c *conversation) {
			a := c.ask(get("/metadata/identity/info?api-version=2018-02-01", metadata))
			if strings.Contains(strings.ToLower(string(a.body)), "tenantid") {
				c.wrong("%s: %d with a tenant", a.to, a.status)
			}
			c.is(a, 404, 403)
		},
	},
	{
		Number: 42, Name: `/metadata/identity: 404 {"error":"Not Found"}`, Mark: SDK, Source: "as IMDS says to paths below it that it does not know, before it looks for the header",
		Sends: "GET, with and without the header",
		check: func(c *conversation) {
			c.says(c.ask(get("/metadata/identity", metadata)), 404, `{"error":"Not Found"}`)
			c.says(c.ask(get("/metadata/identity")), 404, `{"error":"Not Found"}`)
		},
	},
	{
		Number: 43, Name: "instance without api-version: 400 with newest-versions", Mark: Wire, Source: capture,
		Sends: "GET of /metadata/instance, with the header",
		check: func(c *conversation) {
			a := c.ask(get("/metadata/instance", metadata))
			var in struct {
				Error    string   `json:"error"`
				Versions []string `json:"newest-versions"`
			}
			if c.is(a, 400) && (json.Unmarshal(a.body, &in) != nil || len(in.Versions) == 0 || !strings.HasPrefix(in.Error, "Bad request. api-version was not specified")) {
				c.wrong("%s: %s, expected the newest versions", a.to, a.seen())
			}
		},
	},
	{
		Number: 44, Name: "instance without the header: its own error", Mark: Wire, Source: capture,
		Sends: "GET of /metadata/instance with api-version, no header",
		check: func(c *conversation) {
			c.says(c.ask(get("/metadata/instance?api-version=2021-02-01")), 400, `{ "error": "Bad request: . Required metadata header not specified" }`)
		},
	},
	{
		Number: 45, Name: "versions needs no api-version", Mark: Documented, Source: servicePage, Sends: "GET of /metadata/versions, with the header",
		check: func(c *conversation) {
			a := c.ask(get("/metadata/versions", metadata))
			var in struct {
				Versions []string `json:"apiVersions"`
			}
			if c.is(a, 200) && (json.Unmarshal(a.body, &in) != nil || len(in.Versions) == 0) {
				c.wrong("%s: %s, expected apiVersions", a.to, a.seen())
			}
		},
	},
	{
		Number: 46, Name: "attested and POST of scheduledevents: denied", Mark: Policy, Source: "the one signs for the machine, the other approves its maintenance",
		Sends: "GET of the one, POST of the other, with the header", Needs: []Need{SeenUpstream},
		check: func(c *conversation) {
			before := len(c.Stage.Upstream())
			c.is(c.ask(get("/metadata/attested/document?api-version=2021-02-01&nonce="+url.QueryEscape("1234567890"), metadata)), 404, 403)
			c.is(c.ask(request{method: "POST", target: "/metadata/scheduledevents?api-version=2020-07-01", headers: []string{metadata}, body: `{"StartRequests":[{"EventId":"x"}]}`}), 404, 403, 405)
			for _, target := range c.Stage.Upstream()[before:] {
				c.wrong("%s was passed through", target)
			}
		},
	},
}
