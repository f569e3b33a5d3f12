package conformance

import (
	"net/url"
	"strings"
	"time"
)

// identityCases are about whose token it is.
var identityCases = []Case{
	{
		Number: 14, Name: "by client_id: its token, echoed", Mark: Documented, Source: tokenPage,
		Sends: "R with the caller's client_id, as it is and in upper case", Needs: []Need{ClientID},
		check: func(c *conversation) {
			c.own(c.ask(c.R("client_id=" + c.ClientID)))
			c.own(c.ask(c.R("client_id=" + strings.ToUpper(c.ClientID))))
		},
	},
	{
		Number: 15, Name: "an unknown client_id: 400, 68 bytes", Mark: Wire, Source: capture + "; no SDK tries again after 400",
		Sends: "R with a client_id that no identity has",
		check: func(c *conversation) { c.refusesIdentity(c.Caller, c.R("client_id="+nobody)) },
	},
	{
		Number: 16, Name: "object_id is honoured or refused, never ignored", Mark: Documented, Source: tokenPage,
		Sends: "R with an object_id that no identity has, and with the caller's where that is known",
		check: func(c *conversation) {
			a := c.ask(c.R("object_id=" + nobody))
			c.refusal(a, 400)
			c.withoutToken(a)
			if c.ObjectID == "" {
				return
			}
			if a := c.ask(c.R("object_id=" + c.ObjectID)); a.status == 200 {
				c.own(a)
			} else {
				c.refusal(a, 400)
			}
		},
	},
	{
		Number: 17, Name: "by msi_res_id", Mark: Documented, Source: tokenPage,
		Sends: "R with the caller's resource ID", Needs: []Need{ResourceID},
		check: func(c *conversation) { c.own(c.ask(c.R("msi_res_id=" + url.QueryEscape(c.ResourceID)))) },
	},
	{
		Number: 18, Name: "by mi_res_id", Mark: SDK, Source: "adal sends it, and IMDS takes it",
		Sends: "R with the caller's resource ID", Needs: []Need{ResourceID},
		check: func(c *conversation) { c.own(c.ask(c.R("mi_res_id=" + url.QueryEscape(c.ResourceID)))) },
	},
	{
		Number: 19, Name: "a resource ID has no case", Mark: Documented, Source: "Azure compares resource IDs without case",
		Sends: "R with msi_res_id in upper case, in lower case, not encoded", Needs: []Need{ResourceID},
		check: func(c *conversation) {
			for _, id := range []string{strings.ToUpper(c.ResourceID), strings.ToLower(c.ResourceID)} {
				c.own(c.ask(c.R("msi_res_id=" + url.QueryEscape(id))))
				c.own(c.ask(c.R("msi_res_id=" + id)))
			}
		},
	},
	{
		Number: 20, Name: "msi-res-id without the header: 400, 88 bytes", Mark: SDK, Source: "as 6: the header is missed first, whatever else is asked",
		Sends: "R without Metadata, with msi-res-id",
		check: func(c *conversation) {
			c.refusesProbe(get(tokenPath + "?" + c.query(url.QueryEscape(c.Resource), "msi-res-id=/subscriptions/s")))
		},
	},
	{
		Number: 21, Name: "two selectors: 400", Mark: Documented, Source: tokenPage + ": they exclude each other",
		Sends: "R with each pair of client_id, object_id, msi_res_id, mi_res_id",
		check: func(c *conversation) {
			selectors := []string{"client_id=" + or(c.ClientID, nobody), "object_id=" + nobody, "msi_res_id=" + or(url.QueryEscape(c.ResourceID), "/x"), "mi_res_id=" + or(url.QueryEscape(c.ResourceID), "/x")}
			for i, one := range selectors {
				for _, other := range selectors[i+1:] {
					a := c.ask(c.R(one, other))
					c.refusal(a, 400)
					c.withoutToken(a)
				}
			}
		},
	},
	{
		Number: 22, Name: "a parameter twice: 400", Mark: Policy, Source: "a request that can be read in two ways is not guessed at",
		Sends: "R with a second resource, api-version, or client_id",
		check: func(c *conversation) {
			id := "client_id=" + or(c.ClientID, nobody)
			for _, r := range []request{c.R("resource=https://other.example"), c.R("api-version=2018-02-01"), c.R(id, id), c.R(id, "client_id="+nobody)} {
				a := c.ask(r)
				c.refusal(a, 400)
				c.withoutToken(a)
			}
		},
	},
	{
		Number: 23, Name: "several identities, none named: 400, 168 bytes", Mark: Wire, Source: capture,
		Sends: "R from a caller with several; for the agent, under --strict-identity-selection", Needs: []Need{SeveralIDs},
		check: func(c *conversation) {
			caller, err := c.Stage.Several(c.ctx)
			if err != nil {
				c.wrong("no caller with several identities: %v", err)
				return
			}
			c.says(c.askFrom(caller, c.R()), 400, several)
			c.tokenOf(c.askFrom(caller, c.R("client_id="+caller.ClientID)), caller.ClientID)
		},
	},
	{
		Number: 24, Name: "no identity at all: 400 at once, 68 bytes", Mark: Wire,
		Source: capture + "; after 404 azidentity goes on for 70 s", Sends: "R from a caller without identity", Needs: []Need{UnboundPod},
		check: func(c *conversation) {
			caller, err := c.Stage.Unbound(c.ctx)
			if err != nil {
				c.wrong("no caller without identity: %v", err)
				return
			}
			c.refusesIdentity(caller, c.R())
		},
	},
	{
		Number: 25, Name: "not assigned yet: 503 with Retry-After, then a token", Mark: Observed,
		Source: "azidentity comes back after 503 as Retry-After says",
		Sends:  "R while the identity is on its way, then as a client that comes back", Needs: []Need{PendingPod}, check: pending,
	},
}

// refusesIdentity is what ends an SDK's search for an identity at once.
func (c *conversation) refusesIdentity(from Caller, r request) {
	a := c.askFrom(from, r)
	c.says(a, 400, notFound)
	c.soon(from, a)
}

func pending(c *conversation) {
	p, err := c.Stage.Pending(c.ctx)
	if err != nil {
		c.wrong("no caller with an identity on its way: %v", err)
		return
	}
	defer func() {
		if err := p.Done(); err != nil {
			c.wrong("afterwards: %v", err)
		}
	}()
	a := c.askFrom(p.Caller, c.R())
	c.refusal(a, 503)
	wait := c.comesBack(a)
	if err := p.Assign(c.ctx); err != nil {
		c.wrong("the identity cannot be assigned: %v", err)
		return
	}
	c.wait(wait)
	c.tokenOf(c.insisting(p.Caller, c.R()), p.ClientID)
}

// retried are the statuses after which every SDK asks again (tokenPage, Retry
// guidance).
func retried(status int) bool {
	return status == 404 || status == 410 || status == 429 || status >= 500
}

// insisting asks as azidentity does: six times more, as long as Retry-After says
// or 2 s.
func (c *conversation) insisting(from Caller, r request) answer {
	a := c.askFrom(from, r)
	for range 6 {
		if !retried(a.status) {
			break
		}
		wait := 2 * time.Second
		if a.header.Get("Retry-After") != "" {
			wait = c.comesBack(a)
		}
		c.wait(wait)
		a = c.askFrom(from, r)
	}
	return a
}

// wait is a client's patience: what it was told to wait, 30 s at most.
func (c *conversation) wait(d time.Duration) {
	timer := time.NewTimer(min(d, patience))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.ctx.Done():
	}
}

func or(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}
