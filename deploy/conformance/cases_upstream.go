package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
)

// upstreamCases are about what is asked of the service behind, and what becomes
// of its answers.
var upstreamCases = []Case{
	{
		Number: 26, Name: "bypass_cache=true asks upstream", Mark: Documented, Source: tokenPage,
		Sends: "R, then R with bypass_cache=true", Needs: []Need{SeenUpstream},
		check: func(c *conversation) {
			resource := c.unused()
			c.own(c.ask(c.forResource(resource)))
			before := len(c.Stage.Upstream())
			c.own(c.ask(c.forResource(resource, "bypass_cache=true")))
			if len(c.Stage.Upstream()) == before {
				c.wrong("R&bypass_cache=true: answered from memory, expected a request upstream")
			}
		},
	},
	{
		Number: 27, Name: "token_sha256_to_refresh replaces that token and no other", Mark: SDK, Source: "MSAL sends it when a resource has rejected the token",
		Sends: "R with the SHA-256 of another token, then with that of the cached one", Needs: []Need{SeenUpstream}, check: refreshByHash,
	},
	{
		Number: 28, Name: "xms_cc and parameters not known are no matter", Mark: SDK, Source: "newer SDKs send xms_cc",
		Sends: "R with xms_cc=cp1, with parameters of no meaning",
		check: func(c *conversation) {
			for _, parameter := range []string{"xms_cc=cp1", "xms_cc=cp1%2Ccp2", "unknown=1", "unknown"} {
				c.own(c.ask(c.R(parameter)))
			}
		},
	},
	{
		Number: 29, Name: "headers that SDKs add are no matter", Mark: SDK, Source: "MSALs send x-client-*, that for JavaScript a form's Content-Type on GET",
		Sends: "R with x-client-SKU, x-client-Ver, x-ms-client-request-id, Content-Type of a form",
		check: func(c *conversation) {
			r := c.R()
			r.headers = append(r.headers, "x-client-SKU: MSAL.Go", "x-client-Ver: 1.10.1", "x-client-OS: linux",
				"x-ms-client-request-id: 00000000-0000-4000-8000-000000000001", "return-client-request-id: false",
				"Content-Type: application/x-www-form-urlencoded", "Accept: application/json", "User-Agent: azsdk-go")
			r.label = "R with headers of SDKs"
			c.own(c.ask(r))
		},
	},
	{
		Number: 30, Name: "a resource that Entra does not know: 400 invalid_resource", Mark: Documented, Source: tokenPage,
		Sends: "R with such a resource", Needs: []Need{Refusable}, check: refusedResource,
	},
	{
		Number: 31, Name: "throttled: 429 in JSON with Retry-After", Mark: Wire, Source: capture,
		Sends: "R while the service behind throttles once, then as a client that comes back", Needs: []Need{UpstreamFaults},
		check: func(c *conversation) {
			c.Stage.Fault(Fault{Status: 429, RetryAfter: "1", Body: throttled})
			r := c.forNew()
			a := c.ask(r)
			if _, description := c.refusal(a, 429); a.status == 429 && !strings.Contains(description, "too many requests") {
				c.wrong("%s: %s, expected words about too many requests", a.to, a.seen())
			}
			if a.status == 429 {
				c.wait(c.comesBack(a))
			}
			c.own(c.insisting(c.Caller, r))
		},
	},
}

const throttled = `{"error":"invalid_request","error_description":"Temporarily throttled, too many requests"}`

func refreshByHash(c *conversation) {
	resource := c.unused()
	cached := c.own(c.ask(c.forResource(resource)))
	before := len(c.Stage.Upstream())
	ask := func(token string) string {
		hash := sha256.Sum256([]byte(token))
		r := c.forResource(resource, "token_sha256_to_refresh="+hex.EncodeToString(hash[:]))
		r.label = "R with token_sha256_to_refresh"
		return c.own(c.ask(r))
	}
	if ask("another token") != cached || len(c.Stage.Upstream()) != before {
		c.wrong("R with the hash of another token: a new token, expected the cached one")
	}
	if ask(cached) == cached {
		c.wrong("R with the hash of the cached token: the same token, expected a new one")
	}
}

// unknownResource is Entra's refusal, as IMDS hands it on.
const unknownResource = `{"error":"invalid_resource","error_description":"AADSTS500011: The resource principal named %s was not found in the tenant named Contoso."}`

func refusedResource(c *conversation) {
	if c.Stage.Fault != nil {
		c.Stage.Fault(Fault{Status: 400, Body: fmt.Sprintf(unknownResource, c.UnknownResource)})
	}
	a := c.ask(c.forResource(url.QueryEscape(c.UnknownResource)))
	code, description := c.refusal(a, 400)
	if a.status == 400 && (code != "invalid_resource" || !strings.Contains(description, "AADSTS50001")) {
		c.wrong("%s: %s, expected invalid_resource in Entra's words", a.to, a.seen())
	}
}

// errorCases are about errors of any kind.
var errorCases = []Case{
	{
		Number: 32, Name: "every error is JSON", Mark: SDK, Source: "to text/plain @azure/identity says “Network unreachable”",
		Sends: "a dozen well-formed requests that are wrong in as many ways; counted are all errors of the cases before, too",
		check: func(c *conversation) {
			for _, a := range c.allErrors() {
				var fields map[string]any
				if json.Unmarshal(a.body, &fields) != nil || fields["error"] == nil {
					c.wrong("%s: %s, expected JSON with an error", a.to, a.seen())
				} else if got := a.header.Get("Content-Type"); !strings.HasPrefix(got, "application/json") {
					c.wrong("%s: Content-Type %q, expected application/json", a.to, got)
				}
			}
		},
	},
	{
		Number: 33, Name: "no error says unreachable", Mark: SDK,
		Source: "azidentity and @azure/identity take that word for a proxy of Docker Desktop's, and go on", Sends: "as 32",
		check: func(c *conversation) {
			for _, a := range c.allErrors() {
				if bytes.Contains(bytes.ToLower(a.body), []byte("unreachable")) {
					c.wrong("%s: %s", a.to, a.seen())
				}
			}
		},
	},
	{
		Number: 34, Name: "the service behind fails once: clients that come back get a token", Mark: Documented, Source: tokenPage + ", retry guidance",
		Sends: "R, and again as SDKs do, while the service behind answers once 404, 410, 500, 503", Needs: []Need{UpstreamFaults},
		check: func(c *conversation) {
			for _, status := range []int{404, 410, 500, 503} {
				c.Stage.Fault(Fault{Status: status, Body: `{"error":"a fault"}`})
				c.own(c.insisting(c.Caller, c.forNew()))
			}
		},
	},
}

// allErrors provokes some errors, and returns them with all that were heard before.
func (c *conversation) allErrors() []answer {
	for _, r := range []request{
		get(tokenPath), get(tokenPath, metadata), get(tokenPath+"?api-version=2018-02-01", metadata), c.R("client_id=" + nobody),
		get("/metadata/nothing", metadata),
		{method: "POST", target: c.R().target, headers: []string{metadata}},
		get("/metadata/identity"), get("/metadata/instance", metadata), get("/metadata/instance?api-version=2021-02-01"),
	} {
		if a := c.ask(r); a.status < 400 {
			c.wrong("%s: %s, expected an error", a.to, a.seen())
		}
	}
	for _, r := range []request{ // errors here, perhaps not elsewhere
		c.R("client_id=%zz"), c.R("a;b"), get("/"), get("/" + strings.Repeat("x", 4000)), {method: "OPTIONS", target: "*"},
	} {
		c.ask(r)
	}
	return c.errors
}
