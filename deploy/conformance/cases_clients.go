package conformance

import (
	"encoding/json"
	"strings"
)

// clientCases are about requests that single clients send.
var clientCases = []Case{
	{
		Number: 49, Name: "/metadata/identity/oauth2/token/, the slash included", Mark: SDK,
		Source: "@azure/msal-node, and with it @azure/identity, where AZURE_POD_IDENTITY_AUTHORITY_HOST is set",
		Sends:  "R with a slash at the end of the path, also with an unknown client_id and without the header",
		check: func(c *conversation) {
			c.own(c.ask(c.spelled(tokenPath + "/")))
			c.refusesProbe(get(tokenPath + "/"))
			r := c.R("client_id=" + nobody)
			r.target = strings.Replace(r.target, tokenPath, tokenPath+"/", 1)
			c.says(c.ask(r), 400, notFound)
		},
	},
	{
		Number: 50, Name: "mi_res_id without resource and header: 400, 88 bytes", Mark: SDK,
		Source: "probe of newer SDKs for an identity named by its resource ID",
		Sends:  "GET of the token path with api-version and mi_res_id, no header",
		check: func(c *conversation) {
			c.refusesProbe(get(tokenPath + "?api-version=2018-02-01&mi_res_id=%2Fsubscriptions%2Fs"))
		},
	},
	{
		Number: 51, Name: "instance/compute, within 2 s", Mark: SDK, Source: "MSAL.NET asks it for the region",
		Sends: "GET of /metadata/instance/compute, with the header",
		check: func(c *conversation) {
			a := c.ask(get("/metadata/instance/compute?api-version=2021-02-01", metadata))
			if c.is(a, 200) && !json.Valid(a.body) {
				c.wrong("%s: %s, expected JSON", a.to, a.seen())
			}
			c.withoutToken(a)
			c.soon(c.Caller, a)
		},
	},
}
