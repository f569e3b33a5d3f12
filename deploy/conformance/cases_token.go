package conformance

import (
	"bytes"
	"encoding/json"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// tokenCases are about the answer that carries a token.
var tokenCases = []Case{
	{
		Number: 1, Name: "a valid request gets a token", Mark: Wire, Source: capture,
		Sends: "R: GET of the token path with api-version, resource and Metadata: true",
		check: func(c *conversation) {
			a := c.ask(c.R())
			c.own(a)
			if got := a.header.Get("Content-Type"); got != "application/json; charset=utf-8" {
				c.wrong("Content-Type %q, expected application/json; charset=utf-8", got)
			}
			if got := a.header.Get("Content-Length"); got != strconv.Itoa(len(a.body)) {
				c.wrong("Content-Length %q, expected the body's", got)
			}
		},
	},
	{
		Number: 2, Name: "eight fields, all of them strings, in alphabetical order", Mark: Wire,
		Source: capture + "; the Rust SDK and old adal fail on numbers", Sends: "R", check: eightStrings,
	},
	{
		Number: 3, Name: "no field is null or empty", Mark: SDK,
		Source: "azidentity, MSAL Go, Python and adal fail on them", Sends: "R",
		check: func(c *conversation) {
			fields, _ := c.token(c.ask(c.R()))
			for name, value := range fields {
				if value == nil || value == "" {
					c.wrong("%s is %v", name, value)
				}
			}
		},
	},
	{
		Number: 4, Name: "expires_in is what is left until expires_on", Mark: Wire, Source: capture, Sends: "R, twice",
		check: func(c *conversation) {
			for range 2 { // the second is from memory, where there is one
				fields, ok := c.token(c.ask(c.R()))
				left, on := seconds(fields, "expires_in"), seconds(fields, "expires_on")
				if off := on - time.Now().Unix() - left; ok && (off < -2 || off > 2) {
					c.wrong("expires_in is off by more than 2 s from expires_on and this machine's clock")
				}
			}
		},
	},
	{
		Number: 5, Name: "the resource is echoed as it was asked for", Mark: Wire,
		Source: capture + "; Python and Rust need the field", Sends: "R with the resource encoded, not encoded, with a slash at its end",
		check: func(c *conversation) {
			bare := strings.TrimSuffix(c.Resource, "/")
			for _, resource := range []string{url.QueryEscape(bare), bare, bare + "/"} {
				want, err := url.QueryUnescape(resource)
				if err != nil {
					c.wrong("%s: %v", resource, err)
				}
				fields, ok := c.token(c.ask(c.forResource(resource)))
				if ok && fields["resource"] != want {
					c.wrong("resource %v, expected %s", fields["resource"], want)
				}
			}
		},
	},
}

// fieldNames are those of a token, in order.
var fieldNames = []string{"access_token", "client_id", "expires_in", "expires_on", "ext_expires_in", "not_before", "resource", "token_type"}

func eightStrings(c *conversation) {
	a := c.ask(c.R())
	fields, ok := c.token(a)
	if !ok {
		return
	}
	for _, name := range fieldNames {
		if _, text := fields[name].(string); !text {
			c.wrong("%s is %v, expected a string", name, fields[name])
		}
	}
	for name := range fields {
		if !slices.Contains(fieldNames, name) {
			c.wrong("there is a field %s", name)
		}
	}
	var order []string
	decoder := json.NewDecoder(bytes.NewReader(a.body))
	for { // it can be parsed: that has been done above
		token, err := decoder.Token()
		if err != nil {
			break // the end
		}
		if name, ok := token.(string); ok {
			order = append(order, name)
			var value any
			_ = decoder.Decode(&value)
		}
	}
	if !slices.IsSorted(order) {
		c.wrong("the order is %s, expected alphabetical", strings.Join(order, ", "))
	}
}

// seconds reads a field that is a number in a string; 0 if it is not.
func seconds(fields map[string]any, name string) int64 {
	text, _ := fields[name].(string)
	n, _ := strconv.ParseInt(text, 10, 64)
	return n
}

// requestCases are about what a request must have.
var requestCases = []Case{
	{
		Number: 6, Name: "without the header: 400, 88 bytes", Mark: Wire,
		Source: capture + "; probe of the Python and .NET SDKs", Sends: "R without Metadata",
		check: func(c *conversation) { c.refusesProbe(get(tokenPath + "?" + c.query(url.QueryEscape(c.Resource)))) },
	},
	{
		Number: 7, Name: "the bare path: 400, 88 bytes", Mark: SDK,
		Source: "probe of azidentity and @azure/identity, who wait for 1 s", Sends: "GET of the token path, no query, no header",
		check: func(c *conversation) { c.refusesProbe(get(tokenPath)) },
	},
	{
		Number: 8, Name: "api-version alone, no header: 400, 88 bytes", Mark: SDK,
		Source: "probe of adal", Sends: "GET of the token path with api-version, no header",
		check: func(c *conversation) { c.refusesProbe(get(tokenPath + "?api-version=2018-02-01")) },
	},
	{
		Number: 9, Name: "the header's value is true, to the letter", Mark: Wire, Source: capture,
		Sends: "R with Metadata: True, TRUE, 1, nothing, true twice, true and more",
		check: func(c *conversation) {
			for _, header := range [][]string{
				{"Metadata: True"}, {"Metadata: TRUE"}, {"Metadata: 1"}, {"Metadata:"}, {"Metadata: true, true"}, {"Metadata: false", metadata},
			} {
				r := c.R()
				r.headers, r.label = header, "R with "+strings.Join(header, " and ")
				a := c.ask(r)
				c.says(a, 400, noHeader)
				c.withoutToken(a)
			}
			for _, header := range []string{"Metadata: true\x00", "Metadata : true", "Metadata\t: true", "Metadata: \x80true", "M\x00etadata: true"} {
				r := c.R()
				r.headers, r.label = []string{header}, "R with "+strconv.QuoteToASCII(header)
				c.withoutToken(c.malformed(c.Caller, r))
			}
		},
	},
	{
		Number: 10, Name: "the header's name in lower case", Mark: Documented, Source: "RFC 9110, 5.1",
		Sends: "R with metadata: true",
		check: func(c *conversation) {
			r := c.R()
			r.headers = []string{"metadata: true"}
			c.own(c.ask(r))
		},
	},
	{
		Number: 11, Name: "X-Forwarded-For: 400", Mark: Documented, Source: servicePage, Sends: "R with X-Forwarded-For, in two cases",
		check: func(c *conversation) {
			for _, header := range []string{"X-Forwarded-For: 10.0.0.1", "x-forwarded-for: 10.0.0.1"} {
				r := c.R()
				r.headers, r.label = append(r.headers, header), "R with "+header
				a := c.ask(r)
				c.refusal(a, 400)
				c.withoutToken(a)
			}
		},
	},
	{
		Number: 12, Name: "no resource: 400, its text", Mark: Wire, Source: capture, Sends: "R without resource",
		check: func(c *conversation) {
			c.says(c.ask(get(tokenPath+"?api-version=2018-02-01", metadata)), 400, noResource)
		},
	},
	{
		Number: 13, Name: "no api-version: 400", Mark: Documented, Source: tokenPage, Sends: "R without api-version",
		check: func(c *conversation) {
			c.refusal(c.ask(get(tokenPath+"?resource="+url.QueryEscape(c.Resource), metadata)), 400)
		},
	},
}

// refusesProbe is how an SDK learns that there is a metadata service: by the
// refusal for want of the header, within a second.
func (c *conversation) refusesProbe(r request) {
	a := c.ask(r)
	c.says(a, 400, noHeader)
	c.soon(c.Caller, a)
}
